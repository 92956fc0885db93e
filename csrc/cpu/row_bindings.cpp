// rmsnorm, rope, logprob and sample for kernels/*_cpu.py.  A tensor of rows is four numbers: address, inner, outer stride, inner stride.
#include "bindings.hpp"
#include "calls.hpp"
#include "kernels.hpp"

namespace py = pybind11;

namespace athanor::cpu {
namespace {
Rows rows(const py::tuple& r) { return {at(r[0].cast<Address>()), r[1].cast<Size>(), r[2].cast<Size>(), r[3].cast<Size>()}; }
Heads heads(const py::tuple& r, Size count, Address weight, Address out) { return {rows(r), count, at(weight), at(out)}; }
Logits logits(Address x, Size stride, Size T, Size V, Address targets, Address thresholds, Address last_kept, float inverse_temperature) {
    return {at(x), stride, T, V, at<Size>(targets), at(thresholds), at<Size>(last_kept), inverse_temperature};
}
}  // namespace

void bind_rows(py::module_& m) {
    define(m, "linear_fwd", [](Address x, Size x_stride, Address w, Size w_stride, Address bias, Address y, Size T, Size N, Size K, int threads) {
        return [=] { kernels().linear_fwd({at(x), x_stride}, {at(w), w_stride}, at(bias), at(y), T, N, K, threads); };
    });
    define(m, "linear_dx", [](Address dy, Size dy_stride, Address w, Size w_stride, Address dx, Size T, Size N, Size K, int threads) {
        return [=] { kernels().linear_dx({at(dy), dy_stride}, {at(w), w_stride}, at(dx), T, N, K, threads); };
    });
    define(m, "linear_dw", [](Address dy, Size dy_stride, Address x, Size x_stride, Address dw, Size T, Size N, Size K, bool add, int threads) {
        return [=] { kernels().linear_dw({at(dy), dy_stride}, {at(x), x_stride}, at(dw), T, N, K, add, threads); };
    });
    define(m, "grouped_fwd", [](Address x, Size x_stride, Address w, Address y, Address offsets, bool wide, bool led, Size E, Size T, Size N, Size K,
                                int threads) {
        return [=] { kernels().grouped_fwd({at(x), x_stride}, at(w), at(y), {at<void>(offsets), wide, led, E, T}, N, K, threads); };
    });
    define(m, "grouped_dx", [](Address dy, Size dy_stride, Address w, Address dx, Address offsets, bool wide, bool led, Size E, Size T, Size N, Size K,
                               int threads) {
        return [=] { kernels().grouped_dx({at(dy), dy_stride}, at(w), at(dx), {at<void>(offsets), wide, led, E, T}, N, K, threads); };
    });
    define(m, "grouped_dw", [](Address dy, Size dy_stride, Address x, Size x_stride, Address dw, Address offsets, bool wide, bool led, Size E, Size T,
                               Size N, Size K, int threads) {
        return [=] { kernels().grouped_dw({at(dy), dy_stride}, {at(x), x_stride}, at(dw), {at<void>(offsets), wide, led, E, T}, N, K, threads); };
    });
    define(m, "rmsnorm_fwd", [](py::tuple x, py::tuple residual, Address weight, Address s, Address y, Address rstd, Size N, Size D, float eps,
                                int threads) {
        const Rows a = rows(x), b = rows(residual);
        return [=] { kernels().rmsnorm_fwd(a, b, at(weight), at(s), at(y), at(rstd), N, D, eps, threads); };
    });
    define(m, "rmsnorm_bwd", [](py::tuple s, py::tuple dy, py::tuple ds, Address weight, Address rstd, Address dx, Address dweight, Size N, Size D,
                                int threads) {
        const Rows a = rows(s), b = rows(dy), c = rows(ds);
        return [=] { kernels().rmsnorm_bwd(a, b, c, at(weight), at(rstd), at(dx), at(dweight), N, D, threads); };
    });
    define(m, "rope", [](py::tuple q, py::tuple k, Size num_q, Size num_k, Address q_weight, Address k_weight, Address q_out, Address k_out, Address cos,
                         Address sin, Size cos_stride, Size sin_stride, Size T, Size d, float eps, bool inverse, int threads) {
        const Heads a = heads(q, num_q, q_weight, q_out), b = heads(k, num_k, k_weight, k_out);
        return [=] { kernels().rope(a, b, {at(cos), at(sin), cos_stride, sin_stride}, T, d, eps, inverse, threads); };
    });
    define(m, "rope_norm_bwd", [](py::tuple x, py::tuple dy, Size num_heads, Address weight, Address dx, Address dweight, Address cos, Address sin,
                                  Size cos_stride, Size sin_stride, Size T, Size d, float eps, int threads) {
        const Heads a = heads(x, num_heads, weight, dx);
        const Rows b = rows(dy);
        return [=] { kernels().rope_norm_bwd(a, b, {at(cos), at(sin), cos_stride, sin_stride}, at(dweight), T, d, eps, threads); };
    });
    define(m, "logprob_fwd", [](Address x, Size stride, Size T, Size V, Address targets, Address thresholds, Address last_kept, float inverse_temperature,
                                Address logps, Address entropy, Address largest, Address inverse_sum, Address argmax, int threads) {
        return [=] {
            kernels().logprob_fwd(logits(x, stride, T, V, targets, thresholds, last_kept, inverse_temperature), at(logps), at(entropy), at(largest),
                                  at(inverse_sum), at<Size>(argmax), threads);
        };
    });
    define(m, "logprob_bwd", [](Address x, Size stride, Size T, Size V, Address targets, Address thresholds, Address last_kept, float inverse_temperature,
                                Address dlogps, Address largest, Address inverse_sum, Address dlogits, Size dlogits_stride, int threads) {
        return [=] {
            kernels().logprob_bwd(logits(x, stride, T, V, targets, thresholds, last_kept, inverse_temperature), at(dlogps), at(largest),
                                  at(inverse_sum), at(dlogits), dlogits_stride, threads);
        };
    });
    // Each parameter is a number and the address of (B,) numbers that count instead, or 0.
    define(m, "sample", [](Address x, Size stride, Size B, Size V, float temperature, Address temperatures, Size top_k, Address top_ks, double top_p,
                           Address top_ps, double min_p, Address min_ps, Address uniforms, Address tokens, Address last_kept, Address logps,
                           Address full_logps, Address entropy, Address thresholds, int threads) {
        const Sampling sampling{{temperature, at(temperatures)}, {top_k, at<Size>(top_ks)}, {top_p, at<double>(top_ps)}, {min_p, at<double>(min_ps)}};
        const Sampled out{at<Size>(tokens), at<Size>(last_kept), at(logps), at(full_logps), at(entropy), at(thresholds)};
        return [=] { kernels().sample(at(x), stride, B, V, sampling, at<double>(uniforms), out, threads); };
    });
    define(m, "row_positions", [](Address status, Address lengths, Address positions, Address ends, Size count) {
        return [=] { row_positions(at<Size>(status), at<std::int32_t>(lengths), at<std::int32_t>(positions), at<std::int32_t>(ends), count); };
    });
    define(m, "take_rows", [](Address table, Size num_rows, Size width, Address indices, Size count, Address out) {
        return [=] { return take_rows(at(table), num_rows, width, at<Size>(indices), count, at(out)); };
    });
    define(m, "rotation", [](Address positions, bool wide, Address frequencies, float factor, Address cos, Address sin, Size T, Size half, int threads) {
        return [=] { kernels().rotation(at<void>(positions), wide, at(frequencies), factor, at(cos), at(sin), T, half, threads); };
    });
    define(m, "advance_rows", [](Address status, Address generated, Address slots, Address last, Address lengths, Address max_lengths, Address eos,
                                 Size num_eos, Address drawing, Address streaks, Address streak_limits, Address streak_logps, Address full_logps,
                                 Address tokens, Address logps, Address token_ring, Address logp_ring, Size ring_stride, Size count) {
        const DecodeRows rows{at<Size>(status), at<Size>(generated), at<Size>(slots), at<Size>(last), at<std::int32_t>(lengths),
                              at<std::int32_t>(max_lengths), at<Size>(eos), num_eos, at<bool>(drawing), at<Size>(streaks), at<Size>(streak_limits),
                              at(streak_logps), at(full_logps), at<Size>(tokens), at(logps), at<Size>(token_ring), at(logp_ring), ring_stride};
        return [=] { advance_rows(rows, count); };
    });
    define(m, "philox_uniform", [](Address seeds, Address positions, Address uniforms, Size count) {
        return [=] { kernels().philox_uniform(at<Size>(seeds), at<Size>(positions), at<double>(uniforms), count); };
    });
}

}  // namespace athanor::cpu
