// One query token's attention over the paged cache, read in place. Sums over a head's width, over keys and over the
// heads' values stand in one order that only the token's own position decides.
//
// C is the type of attention's own products, as core_dtype in model/attention.py has it: double under FP32, so that
// absorbed and expanded forms round to the same FP32 numbers; float under BF16.
// Letters: H heads that share keys, S key positions, W width of a query, V width of a value.
#pragma once

#include <cmath>

#include "matrix.h"

namespace abyssal {

template <class C>
struct VectorOf;
template <>
struct VectorOf<double> { typedef Doubles type; };
template <>
struct VectorOf<float> { typedef Floats type; };

// Where a sequence's entries of one layer lie.
template <class T>
struct Entries {
    T* cache;            // (slots, width)
    const int64_t* blocks;  // of the sequence
    int64_t block_size, width;
    T* at(int64_t position) const {
        return cache + (blocks[position / block_size] * block_size + position % block_size) * width;
    }
};

template <class C>
inline int64_t padded(int64_t n) {
    constexpr int L = Lanes<typename VectorOf<C>::type>::n;
    return (n + L - 1) / L * L;
}

// scores_HS[h][s] = q_h . k_s. Queries are padded with zeros to whole vectors.
template <class C, class T, int H>
inline void score(const C* q_HW, int64_t width, const Entries<T>& entries, int64_t offset, int64_t n_keys, C* scores_HS,
                  int64_t stride) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, KEYS = H >= 5 ? 1 : H >= 3 ? 2 : 4;
    const int64_t padded_width = padded<C>(width), whole = width / L * L;
    const int rest = int(width - whole);
    auto some = [&]<int N>(int64_t s) {
        const T* key[N];
        for (int i = 0; i < N; i++) key[i] = entries.at(s + i) + offset;
        V sum[H][N] = {};
        for (int64_t w = 0; w < whole; w += L) {
            V k[N];
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) k[i] = load<V>(key[i] + w);
#pragma GCC unroll 8
            for (int h = 0; h < H; h++) {
                const V q = load<V>(q_HW + h * padded_width + w);
#pragma GCC unroll 4
                for (int i = 0; i < N; i++) sum[h][i] = fma(q, k[i], sum[h][i]);
            }
        }
        if (rest)
            for (int i = 0; i < N; i++) {
                const V k = load_some<V>(key[i] + whole, rest);
                for (int h = 0; h < H; h++) sum[h][i] = fma(load<V>(q_HW + h * padded_width + whole), k, sum[h][i]);
            }
        for (int h = 0; h < H; h++)
            for (int i = 0; i < N; i++) scores_HS[h * stride + s + i] = sum_lanes(sum[h][i]);
    };
    int64_t s = 0;
    for (; s + KEYS <= n_keys; s += KEYS) some.template operator()<KEYS>(s);
    for (; s < n_keys; s++) some.template operator()<1>(s);
}

// Scores become weights exp(score - largest); returns their sum. The row is padded with -inf to whole vectors.
template <class C>
inline C soften(C* scores_S, int64_t n_keys) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n;
    const int64_t padded_keys = padded<C>(n_keys);
    for (int64_t s = n_keys; s < padded_keys; s++) scores_S[s] = -std::numeric_limits<C>::infinity();
    V largest = load<V>(scores_S);
    for (int64_t s = L; s < padded_keys; s += L) {
        const V x = load<V>(scores_S + s);
        largest = (x > largest) ? x : largest;
    }
    C top = largest[0];
    for (int i = 1; i < L; i++) top = largest[i] > top ? largest[i] : top;
    V sum = {};
    for (int64_t s = 0; s < padded_keys; s += L) {
        const V weight = exp(load<V>(scores_S + s) - top);
        store(scores_S + s, weight);
        sum += weight;
    }
    return sum_lanes(sum);
}

// out_HV[h] = sum over s of weights[h][s] x value_s; out is padded to whole vectors.
template <class C, class T, int H>
inline void mix(const C* weights_HS, int64_t stride, int64_t width, const Entries<T>& entries, int64_t offset,
                int64_t n_keys, C* out_HV) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, KEYS = 32;  // as many as stay in the nearest cache while all columns pass over them
    constexpr int SIDE = H >= 5 ? 1 : H >= 3 ? 2 : 4;
    const int64_t padded_width = padded<C>(width);
    for (int64_t i = 0; i < H * padded_width; i++) out_HV[i] = 0;
    const T* value[KEYS];
    for (int64_t s = 0; s < n_keys; s += KEYS) {
        const int n = int(std::min<int64_t>(KEYS, n_keys - s));
        for (int i = 0; i < n; i++) value[i] = entries.at(s + i) + offset;
        auto columns = [&]<int N>(int64_t c, int some) {
            V sum[H][N];
#pragma GCC unroll 8
            for (int h = 0; h < H; h++)
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) sum[h][j] = load<V>(out_HV + h * padded_width + c + j * L);
            for (int i = 0; i < n; i++) {
                V x[N];
#pragma GCC unroll 4
                for (int j = 0; j < N; j++)
                    x[j] = some ? load_some<V>(value[i] + c, some) : load<V>(value[i] + c + j * L);
#pragma GCC unroll 8
                for (int h = 0; h < H; h++) {
                    const V weight = all<V>(weights_HS[h * stride + s + i]);
#pragma GCC unroll 4
                    for (int j = 0; j < N; j++) sum[h][j] = fma(weight, x[j], sum[h][j]);
                }
            }
#pragma GCC unroll 8
            for (int h = 0; h < H; h++)
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) store(out_HV + h * padded_width + c + j * L, sum[h][j]);
        };
        int64_t c = 0;
        for (; c + SIDE * L <= width; c += SIDE * L) columns.template operator()<SIDE>(c, 0);
        for (; c + L <= width; c += L) columns.template operator()<1>(c, 0);
        if (c < width) columns.template operator()<1>(c, int(width - c));
    }
}

constexpr int MOST_HEADS = 8;  // at a time

// Softmax attention of H heads over n_keys entries: queries carry the scale. `scores` has room for MOST_HEADS x stride.
template <class C, class T, int H>
inline void attend_heads(const C* q_HW, int64_t width, const Entries<T>& entries, int64_t key_offset,
                         int64_t value_offset, int64_t value_width, int64_t n_keys, C* scores_HS, int64_t stride,
                         C* out_HV) {
    score<C, T, H>(q_HW, width, entries, key_offset, n_keys, scores_HS, stride);
    C sum[H];
    for (int h = 0; h < H; h++) sum[h] = soften(scores_HS + h * stride, n_keys);
    mix<C, T, H>(scores_HS, stride, value_width, entries, value_offset, n_keys, out_HV);
    const int64_t padded_width = padded<C>(value_width);
    for (int h = 0; h < H; h++)
        for (int64_t c = 0; c < value_width; c++) out_HV[h * padded_width + c] /= sum[h];
}

// The same for any number of heads, as many at a time as the registers hold.
template <class C, class T>
inline void attend(int n_heads, const C* q_HW, int64_t width, const Entries<T>& entries, int64_t key_offset,
                   int64_t value_offset, int64_t value_width, int64_t n_keys, C* scores_HS, int64_t stride, C* out_HV) {
    const int64_t room = padded<C>(width), room_out = padded<C>(value_width);
    for (int h = 0; h < n_heads;) {
        auto with = [&]<int H>() {
            attend_heads<C, T, H>(q_HW + h * room, width, entries, key_offset, value_offset, value_width, n_keys,
                                  scores_HS, stride, out_HV + h * room_out);
            h += H;
        };
        const int left = n_heads - h;
        if (left >= 8) with.template operator()<8>();
        else if (left >= 4) with.template operator()<4>();
        else if (left == 3) with.template operator()<3>();
        else if (left == 2) with.template operator()<2>();
        else with.template operator()<1>();
    }
}

// out[r] (COLUMNS wide) = sum over i of x[r][i] x w[i]: a few rows times a small matrix that is kept as floats, in C.
template <class C, int ROWS>
inline void small_product(const C* const* x, const float* w_IO, int64_t n_in, int64_t n_out, C* const* out) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, SIDE = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
    auto columns = [&]<int N>(int64_t c, int some) {
        V sum[ROWS][N];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) sum[r][j] = V{};
        for (int64_t i = 0; i < n_in; i++) {
            const float* row = w_IO + i * n_out + c;
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) {
                const V y = some ? load_some<V>(row, some) : load<V>(row + j * L);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) sum[r][j] = fma(all<V>(x[r][i]), y, sum[r][j]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < N; j++) {
                if (some) for (int i = 0; i < some; i++) out[r][c + i] = sum[r][j][i];
                else store(out[r] + c + j * L, sum[r][j]);
            }
    };
    int64_t c = 0;
    for (; c + SIDE * L <= n_out; c += SIDE * L) columns.template operator()<SIDE>(c, 0);
    for (; c + L <= n_out; c += L) columns.template operator()<1>(c, 0);
    if (c < n_out) columns.template operator()<1>(c, int(n_out - c));
}

template <class C>
inline void small_products(const C* const* x, int n_rows, const float* w_IO, int64_t n_in, int64_t n_out, C* const* out) {
    int r = 0;
    for (; r + 4 <= n_rows; r += 4) small_product<C, 4>(x + r, w_IO, n_in, n_out, out + r);
    if (r + 2 <= n_rows) small_product<C, 2>(x + r, w_IO, n_in, n_out, out + r), r += 2;
    if (r < n_rows) small_product<C, 1>(x + r, w_IO, n_in, n_out, out + r);
}

}  // namespace abyssal
