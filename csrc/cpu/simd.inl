// Sixteen floats at a time, on every machine: AVX-512 has registers of that width, AVX2 and SSE take two and four.  So the order of every sum is
// written in the source and does not depend on the machine, the number of threads or a loop's remainder.  No header guard: included once per
// instruction set, inside its namespace.

typedef float v16 __attribute__((vector_size(64)));
typedef float v16_unaligned __attribute__((vector_size(64), aligned(4)));
typedef std::int32_t i16 __attribute__((vector_size(64)));

constexpr std::int64_t kLanes = 16;

#define ATHANOR_INLINE inline __attribute__((always_inline))

ATHANOR_INLINE v16 load(const float* p) { return *reinterpret_cast<const v16_unaligned*>(p); }
ATHANOR_INLINE void store(float* p, v16 x) { *reinterpret_cast<v16_unaligned*>(p) = x; }
ATHANOR_INLINE v16 splat(float x) { return x - v16{}; }

// The first n of 16 lanes, the others `fill`.
#ifdef ATHANOR_AVX512
ATHANOR_INLINE __mmask16 first_lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
ATHANOR_INLINE v16 load_first(const float* p, std::int64_t n, float fill = 0) { return _mm512_mask_loadu_ps(splat(fill), first_lanes(n), p); }
ATHANOR_INLINE void store_first(float* p, std::int64_t n, v16 x) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
#else
ATHANOR_INLINE v16 load_first(const float* p, std::int64_t n, float fill = 0) {
    float lanes[kLanes];
    for (std::int64_t i = 0; i < kLanes; ++i) {
        lanes[i] = i < n ? p[i] : fill;
    }
    return load(lanes);
}
ATHANOR_INLINE void store_first(float* p, std::int64_t n, v16 x) {
    float lanes[kLanes];
    store(lanes, x);
    const float* from = lanes;
    for (std::int64_t part = kLanes / 2; part; part /= 2) {  // of fixed sizes: a copy of n floats would be a call
        if (n & part) {
            std::memcpy(p, from, part * sizeof(float));
            p += part;
            from += part;
        }
    }
}
#endif

// Lanes of a and b by constant indices: 0-15 are a's, 16-31 b's.
#ifdef __clang__
#define ATHANOR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ATHANOR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i16{__VA_ARGS__})
#endif

// f over all lanes, the upper half on the lower one until one lane is left: the same tree whatever the vector held.
template <typename F>
ATHANOR_INLINE float over_halves(v16 x, F&& f) {
    x = f(x, ATHANOR_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
    x = f(x, ATHANOR_SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
    x = f(x, ATHANOR_SHUFFLE(x, x, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
    x = f(x, ATHANOR_SHUFFLE(x, x, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
    return x[0];
}
ATHANOR_INLINE v16 maximum(v16 a, v16 b) { return (a > b) | (a != a) ? a : b; }  // NaN where either is NaN
ATHANOR_INLINE float sum(v16 x) {
    return over_halves(x, [](v16 a, v16 b) { return a + b; });
}
ATHANOR_INLINE float largest(v16 x) { return over_halves(x, maximum); }

// Sixteen rows become sixteen columns: a perfect shuffle of all 256 floats, four times.
ATHANOR_INLINE void transpose(v16 (&x)[kLanes]) {
#pragma GCC unroll 4
    for (int step = 0; step < 4; ++step) {
        v16 y[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            y[2 * i] = ATHANOR_SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = ATHANOR_SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            x[i] = y[i];
        }
    }
}

// x, opaque: a product is not fused with what is added to it afterwards.  Of two products in one sum the compiler fuses whichever it meets first,
// which may differ between two places where the same function is inlined.
ATHANOR_INLINE v16 rounded(v16 x) {
#ifdef ATHANOR_AVX512
    asm("" : "+v"(x));
#else
    asm("" : "+m"(x));  // several registers
#endif
    return x;
}

// e^x to 1 ulp or so (Cody and Waite's reduction, a polynomial of degree 6 fitted on [-ln2/2, ln2/2]); 0 below -87.3 with gradual underflow cut off,
// inf above 88.7, NaN for NaN.
ATHANOR_INLINE v16 exponential(v16 x) {
    const v16 low = splat(-87.33654f), high = splat(88.72283f);
    const v16 clamped = x < low ? low : (x > high ? high : x);
    const v16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const v16 n = (clamped * splat(1.44269504088896341f) + magic) - magic;
    v16 r = clamped - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    v16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const i16 exponent = __builtin_convertvector(x != x ? v16{} : n, i16);
    // 2^n as two factors: n = 128 has no float of its own.
    const i16 half = exponent / 2;
    const v16 first = reinterpret_cast<v16>((half + 127) << 23), second = reinterpret_cast<v16>((exponent - half + 127) << 23);
    const v16 y = p * first * second;
    return x < low ? v16{} : (x > high ? splat(__builtin_inff()) : y);
}

// Memory for one call, not initialised.  A type of this namespace: of a standard container that is compiled here for a new instruction set, the
// linker might keep this copy for the whole program.
template <typename T>
class Scratch {
  public:
    explicit Scratch(std::int64_t count) : at_(count ? new T[static_cast<std::size_t>(count)] : nullptr) {}
    ~Scratch() { delete[] at_; }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return at_; }

  private:
    T* at_;
};

// Call body(i, lanes) for i = 0, 16, 32, ... below count; `lanes` loads and stores 16 floats, fewer at the end (lanes beyond it read as `fill`).
// The arithmetic of the last step is that of the others.
struct WholeLanes {
    ATHANOR_INLINE v16 load(const float* p, float = 0) const { return ATHANOR_ISA::load(p); }
    ATHANOR_INLINE void store(float* p, v16 x) const { ATHANOR_ISA::store(p, x); }
};
struct FirstLanes {
    std::int64_t n;
    ATHANOR_INLINE v16 load(const float* p, float fill = 0) const { return load_first(p, n, fill); }
    ATHANOR_INLINE void store(float* p, v16 x) const { store_first(p, n, x); }
};
template <typename Body>
ATHANOR_INLINE void over_lanes(std::int64_t count, Body&& body) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        body(i, WholeLanes{});
    }
    if (i < count) {
        body(i, FirstLanes{count - i});
    }
}
