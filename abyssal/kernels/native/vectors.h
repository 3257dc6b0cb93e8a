// Vectors of the widest kind that the machine has, by GCC's vector extensions, and the few functions that
// models need of them. No sum here depends on anything but its own operands.
//
// exp is Sleef's expf at 1 ulp (Shibata and Petrogalli 2019), the form that torch uses on a CPU, so that SiLU and
// sigmoid give torch's bits. Products that are summed use one fused multiply-add each; nothing else is contracted.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace abyssal {

#if defined(__AVX512F__)
constexpr int FLOATS = 16;
#else
constexpr int FLOATS = 8;
#endif
constexpr int DOUBLES = FLOATS / 2;

typedef float Floats __attribute__((vector_size(FLOATS * 4)));
typedef double Doubles __attribute__((vector_size(FLOATS * 4)));
typedef int32_t Ints __attribute__((vector_size(FLOATS * 4)));
typedef int64_t Longs __attribute__((vector_size(FLOATS * 4)));
typedef float HalfFloats __attribute__((vector_size(FLOATS * 2)));
typedef uint16_t Shorts __attribute__((vector_size(FLOATS * 2)));
typedef uint32_t Unsigneds __attribute__((vector_size(FLOATS * 4)));
typedef uint16_t HalfShorts __attribute__((vector_size(FLOATS)));
typedef uint32_t HalfUnsigneds __attribute__((vector_size(FLOATS * 2)));

struct bf16 {
    uint16_t bits;
};

inline float number(float x) { return x; }
inline float number(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// To the nearest BF16 number, ties to even, as torch rounds.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <class T>
T stored(float x);
template <>
inline float stored<float>(float x) { return x; }
template <>
inline bf16 stored<bf16>(float x) { return to_bf16(x); }

// What is left of x when it is kept in T.
template <class T>
inline float rounded(float x) { return number(stored<T>(x)); }

template <class V>
struct Lanes;
template <>
struct Lanes<Floats> {
    static constexpr int n = FLOATS;
    typedef float scalar;
};
template <>
struct Lanes<Doubles> {
    static constexpr int n = DOUBLES;
    typedef double scalar;
};

template <class V>
inline V all(typename Lanes<V>::scalar x) { return x - V{}; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__) && defined(__AVX__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__x86_64__)
    return a * b + c;
#else
    for (int i = 0; i < FLOATS; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__) && defined(__AVX__)
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__x86_64__)
    return a * b + c;
#else
    for (int i = 0; i < DOUBLES; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
#endif
}

template <class V, class S>
inline V same_bytes(const S* at) {
    V out;
    std::memcpy(&out, at, sizeof(V));
    return out;
}

// `load<V>(at)`: as many numbers from memory, whatever their type there, as V holds.
template <class V>
V load(const float* at);
template <class V>
V load(const bf16* at);
template <class V>
V load(const double* at);
template <>
inline Floats load<Floats>(const float* at) { return same_bytes<Floats>(at); }
template <>
inline Doubles load<Doubles>(const double* at) { return same_bytes<Doubles>(at); }
template <>
inline Doubles load<Doubles>(const float* at) {
#if defined(__AVX__) && !defined(__AVX512F__)
    return (Doubles)_mm256_cvtps_pd(_mm_loadu_ps(at));  // of the line below GCC 12 makes several instructions
#else
    return __builtin_convertvector(same_bytes<HalfFloats>(at), Doubles);
#endif
}
template <>
inline Floats load<Floats>(const bf16* at) {
    return (Floats)(__builtin_convertvector(same_bytes<Shorts>(at), Unsigneds) << 16);
}
template <>
inline Doubles load<Doubles>(const bf16* at) {
    return __builtin_convertvector((HalfFloats)(__builtin_convertvector(same_bytes<HalfShorts>(at), HalfUnsigneds) << 16), Doubles);
}
// The first n, then zeros.
template <class V, class S>
inline V load_some(const S* at, int n) {
    S some[Lanes<V>::n] = {};
    for (int i = 0; i < n; i++) some[i] = at[i];
    return load<V>(some);
}

template <class V>
inline void store(typename Lanes<V>::scalar* at, V x) { std::memcpy(at, &x, sizeof(V)); }

// Neighbours first, then pairs of neighbours, and so on.
template <class V>
inline typename Lanes<V>::scalar sum_lanes(V x) {
    constexpr int n = Lanes<V>::n;
    typename Lanes<V>::scalar sums[n];
    store(sums, x);
    for (int width = 1; width < n; width *= 2)
        for (int i = 0; i < n; i += 2 * width) sums[i] += sums[i + width];
    return sums[0];
}

// The same of four vectors at once, into out[0..3].
template <class V>
inline void sum_lanes_of_four(V a, V b, V c, V d, typename Lanes<V>::scalar* out) {
#if defined(__AVX__) && !defined(__AVX512F__)
    if constexpr (sizeof(typename Lanes<V>::scalar) == 8) {
        const __m256d ab = _mm256_hadd_pd((__m256d)a, (__m256d)b), cd = _mm256_hadd_pd((__m256d)c, (__m256d)d);
        _mm256_storeu_pd((double*)out, _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31)));
        return;
    } else {
        const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
        const __m256 halves = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps((float*)out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
        return;
    }
#endif
    out[0] = sum_lanes(a), out[1] = sum_lanes(b), out[2] = sum_lanes(c), out[3] = sum_lanes(d);
}

inline Floats exp(Floats d) {
    const Floats magic = all<Floats>(12582912.0f);  // 1.5 x 2^23: adding it rounds to a whole number, ties to even
    Floats q = d * 1.4426950408889634f;
    q = (q < -1e6f) ? all<Floats>(-1e6f) : q;
    q = (q > 1e6f) ? all<Floats>(1e6f) : q;
    q = (q + magic) - magic;
    Floats s = fma(q, all<Floats>(-0.693145751953125f), d);
    s = fma(q, all<Floats>(-1.428606765330187045e-06f), s);
    Floats u = all<Floats>(0.000198527617612853646278381f);
    u = fma(u, s, all<Floats>(0.00139304355252534151077271f));
    u = fma(u, s, all<Floats>(0.00833336077630519866943359f));
    u = fma(u, s, all<Floats>(0.0416664853692054748535156f));
    u = fma(u, s, all<Floats>(0.166666671633720397949219f));
    u = fma(u, s, all<Floats>(0.5f));
    u = 1.0f + fma(s * s, u, s);
    const Ints whole = __builtin_convertvector(q, Ints), half = whole >> 1;
    u = u * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
    u = (d < -104.0f) ? Floats{} : u;
    u = (d > 100.0f) ? all<Floats>(std::numeric_limits<float>::infinity()) : u;
    return (d == d) ? u : d;
}

// Its error is far below what rounding the result to FP32 leaves.
inline Doubles exp(Doubles d) {
    const Doubles magic = all<Doubles>(6755399441055744.0);  // 1.5 x 2^52
    Doubles x = (d < -708.0) ? all<Doubles>(-708.0) : d;
    x = (x > 709.0) ? all<Doubles>(709.0) : x;
    Doubles q = (x * 1.4426950408889634 + magic) - magic;
    Doubles s = fma(q, all<Doubles>(-0.69314718055966295651160180568695068359375), x);
    s = fma(q, all<Doubles>(-0.28235290563031577122588448175013436025525412068e-12), s);
    Doubles u = all<Doubles>(1.0 / 6227020800.0);
    const double inverse[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                              1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
#pragma GCC unroll 13
    for (double term : inverse) u = fma(u, s, all<Doubles>(term));
    const Longs power = ((Longs)(q + magic) - (Longs)magic + 1023) << 52;
    u = u * (Doubles)power;
    u = (d < -708.0) ? Doubles{} : u;
    return (d == d) ? u : d;
}

// 1 / (1 + exp(-x)) and x / (1 + exp(-x))
inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(0.0f - x)); }
inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// Sum of squares in the order of torch's `sum` over a contiguous row: four vectors side by side, carried to a higher
// level every 16 of them, then lane after lane. The trainer's RMSNorm then has the same bits.
inline float sum_of_squares(const float* x, int64_t n) {
    constexpr int LEVELS = 4, SIDE = 4;
    const int64_t n_vectors = n / FLOATS, size = n_vectors / SIDE;
    int64_t log = 0;
    while ((int64_t(1) << log) < size) log++;
    const int64_t power = log / LEVELS > 4 ? log / LEVELS : 4, step = int64_t(1) << power, mask = step - 1;
    Floats sums[LEVELS][SIDE] = {};
    int64_t i = 0;
    auto add = [&](int64_t row) {
        for (int k = 0; k < SIDE; k++) {
            const Floats v = load<Floats>(x + (row * SIDE + k) * FLOATS);
            sums[0][k] += v * v;
        }
    };
    while (i + step <= size) {
        for (int64_t j = 0; j < step; j++, i++) add(i);
        for (int level = 1; level < LEVELS; level++) {
            for (int k = 0; k < SIDE; k++) {
                sums[level][k] += sums[level - 1][k];
                sums[level - 1][k] = Floats{};
            }
            if (i & (mask << (level * power))) break;
        }
    }
    for (; i < size; i++) add(i);
    for (int level = 1; level < LEVELS; level++)
        for (int k = 0; k < SIDE; k++) sums[0][k] += sums[level][k];
    for (i = size * SIDE; i < n_vectors; i++) {
        const Floats v = load<Floats>(x + i * FLOATS);
        sums[0][0] += v * v;
    }
    for (int k = 1; k < SIDE; k++) sums[0][0] += sums[0][k];
    float sum = 0;
    for (i = n_vectors * FLOATS; i < n; i++) sum += x[i] * x[i];
    for (int lane = 0; lane < FLOATS; lane++) sum += sums[0][0][lane];
    return sum;
}

}  // namespace abyssal
