// What the row-wise kernels take.
#pragma once

#include <cstdint>

namespace athanor::cpu {

// Row r of a tensor whose last axis lies in neighbours and whose other axes form two strides at most.
struct Rows {
    const float* at;  // null: there is no such tensor
    std::int64_t inner, outer_stride, inner_stride;
    const float* row(std::int64_t r) const { return at + r / inner * outer_stride + r % inner * inner_stride; }
};

// Rows of neighbours, `stride` floats apart.
struct Matrix {
    const float* at;
    std::int64_t stride;
};

// T rows of which those from at(e) to at(e + 1) belong to expert e < E, in ascending order.
struct Groups {
    const void* offsets;  // (E + 1,) or, `led` false, (E,): without the 0 in front
    bool wide, led;       // int64, else int32
    std::int64_t E, T;
    std::int64_t at(std::int64_t e) const {
        if (!led && e == 0) {
            return 0;
        }
        e -= led ? 0 : 1;
        return wide ? static_cast<const std::int64_t*>(offsets)[e] : static_cast<const std::int32_t*>(offsets)[e];
    }
};

// (T, count, d): row t * count + h is head h of token t.
struct Heads {
    Rows rows;
    std::int64_t count;
    const float* weight;  // (d,) of the norm; null: none
    float* out;           // (T, count, d) contiguous
};

// (T, d / 2) each.
struct Angles {
    const float *cos, *sin;
    std::int64_t cos_stride, sin_stride;
};

// (T, V) with what logprob wants of each row.
struct Logits {
    const float* at;
    std::int64_t stride, T, V;
    const std::int64_t* targets;  // (T,), outside [0, V): skip
    const float* thresholds;      // (T,), with last_kept the support; null: none
    const std::int64_t* last_kept;
    float inverse_temperature;

    const float* row(std::int64_t t) const { return at + t * stride; }
    std::int64_t target(std::int64_t t) const { return targets[t] >= 0 && targets[t] < V ? targets[t] : -1; }
    float threshold(std::int64_t t) const { return thresholds ? thresholds[t] : -__builtin_inff(); }
    std::int64_t last(std::int64_t t) const { return thresholds ? last_kept[t] : V - 1; }
};

// A parameter of sample: one number, or one for each row.
template <typename T>
struct PerRow {
    T value;
    const T* rows;  // null: value
    T operator[](std::int64_t row) const { return rows ? rows[row] : value; }
};
struct Sampling {
    PerRow<float> temperature;  // 0: greedy
    PerRow<std::int64_t> top_k;
    PerRow<double> top_p, min_p;
};
struct Sampled {
    std::int64_t *tokens, *last_kept;
    float *logps, *full_logps, *entropy, *thresholds;
};

}  // namespace athanor::cpu
