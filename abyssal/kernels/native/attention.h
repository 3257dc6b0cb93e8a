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

// Where a sequence's entries of one layer lie, key after key: found once for all heads.
template <class T>
class Entries {
  public:
    void find(const T* cache, const int64_t* blocks, int64_t block_size, int64_t width, int64_t n_keys) {
        const T** at = at_S_.sized(n_keys);
        for (int64_t start = 0; start < n_keys; start += block_size) {
            const T* entry = cache + *blocks++ * block_size * width;
            for (int64_t s = start; s < std::min(start + block_size, n_keys); s++, entry += width) at[s] = entry;
        }
        n_keys_ = n_keys;
    }
    int64_t n_keys() const { return n_keys_; }
    const T* at(int64_t s) const { return at_S_.get()[s]; }
    // Asks memory for a part of an entry.
    void ask(int64_t s, int64_t offset, int64_t width) const {
        if (s >= n_keys_) return;
        const char* from = reinterpret_cast<const char*>(at(s) + offset);
        for (int64_t byte = 0; byte < int64_t(width * sizeof(T)); byte += 64) __builtin_prefetch(from + byte);
    }

  private:
    Buffer<const T*> at_S_;
    int64_t n_keys_ = 0;
};

template <class C>
inline int64_t padded(int64_t n) {
    constexpr int L = Lanes<typename VectorOf<C>::type>::n;
    return (n + L - 1) / L * L;
}

constexpr int KEYS_AHEAD = 8;  // between asking for a key and using it
constexpr int MOST_HEADS = 4;  // at a time: as many as the registers hold beside several keys

// Scores stand key after key, those of the heads side by side, in whole vectors.
template <class C>
constexpr int side_by_side() { return std::max<int>(MOST_HEADS, Lanes<typename VectorOf<C>::type>::n); }

// scores_SH[s][h] = q_h . k_s. Queries are padded with zeros to whole vectors. `next`: so far behind a key lies what is
// read after it, its value; memory is asked for that on the way.
template <class C, class T, int H>
inline void score(const C* q_HW, int64_t width, const Entries<T>& entries, int64_t offset, int64_t next, C* scores_SH) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, KEYS = H >= 3 ? 3 : 4, ROOM = side_by_side<C>();
    const int64_t padded_width = padded<C>(width), whole = width / L * L, n_keys = entries.n_keys();
    const int rest = int(width - whole);
    auto some = [&]<int N>(int64_t s) {
        const T* key[N];
        for (int i = 0; i < N; i++) key[i] = entries.at(s + i) + offset;
        for (int i = 0; i < N; i++) entries.ask(s + i + KEYS_AHEAD, offset, width);
        V sum[4][N] = {};  // of heads that are not there it stays zero
        for (int64_t w = 0; w < whole; w += L) {
            V k[N];
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) k[i] = load<V>(key[i] + w);
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) __builtin_prefetch(key[i] + w + next);
#pragma GCC unroll 4
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
        for (int i = 0; i < N; i++) sum_lanes_of_four(sum[0][i], sum[1][i], sum[2][i], sum[3][i], scores_SH + (s + i) * ROOM);
    };
    int64_t s = 0;
    for (; s + KEYS <= n_keys; s += KEYS) some.template operator()<KEYS>(s);
    for (; s < n_keys; s++) some.template operator()<1>(s);
}

// Scores become weights exp(score - largest of the head); sums_H are their sums.
template <class C>
inline void soften(C* scores_SH, int64_t n_keys, C* sums_H) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, ROOM = side_by_side<C>();
    for (int at = 0; at < ROOM; at += L) {
        V largest = load<V>(scores_SH + at), sum = {};
        for (int64_t s = 1; s < n_keys; s++) {
            const V x = load<V>(scores_SH + s * ROOM + at);
            largest = (x > largest) ? x : largest;
        }
        for (int64_t s = 0; s < n_keys; s++) {
            const V weight = exp(load<V>(scores_SH + s * ROOM + at) - largest);
            store(scores_SH + s * ROOM + at, weight);
            sum += weight;
        }
        store(sums_H + at, sum);
    }
}

// out_HV[h] = sum over s of weights[s][h] x value_s; out is padded to whole vectors. `next`: as above, to the key that
// other heads read after this value.
template <class C, class T, int H>
inline void mix(const C* weights_SH, int64_t width, const Entries<T>& entries, int64_t offset, int64_t next, C* out_HV) {
    typedef typename VectorOf<C>::type V;
    constexpr int L = Lanes<V>::n, KEYS = 32;  // as many as stay in the nearest cache while all columns pass over them
    constexpr int SIDE = H >= 3 ? 3 : 4, ROOM = side_by_side<C>();
    const int64_t padded_width = padded<C>(width), n_keys = entries.n_keys();
    for (int64_t i = 0; i < H * padded_width; i++) out_HV[i] = 0;
    const T* value[KEYS];
    for (int64_t s = 0; s < n_keys; s += KEYS) {
        const int n = int(std::min<int64_t>(KEYS, n_keys - s));
        for (int i = 0; i < n; i++) value[i] = entries.at(s + i) + offset;
        auto columns = [&]<int N, bool WHOLE>(int64_t c) {
            V sum[H][N];
#pragma GCC unroll 4
            for (int h = 0; h < H; h++)
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) sum[h][j] = load<V>(out_HV + h * padded_width + c + j * L);
            for (int i = 0; i < n; i++) {
                __builtin_prefetch(value[i] + c + next);
                V x[N];
#pragma GCC unroll 4
                for (int j = 0; j < N; j++)
                    x[j] = WHOLE ? load<V>(value[i] + c + j * L) : load_some<V>(value[i] + c, int(width - c));
#pragma GCC unroll 4
                for (int h = 0; h < H; h++) {
                    const V weight = all<V>(weights_SH[(s + i) * ROOM + h]);
#pragma GCC unroll 4
                    for (int j = 0; j < N; j++) sum[h][j] = fma(weight, x[j], sum[h][j]);
                }
            }
#pragma GCC unroll 4
            for (int h = 0; h < H; h++)
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) store(out_HV + h * padded_width + c + j * L, sum[h][j]);
        };
        int64_t c = 0;
        for (; c + SIDE * L <= width; c += SIDE * L) columns.template operator()<SIDE, true>(c);
        for (; c + L <= width; c += L) columns.template operator()<1, true>(c);
        if (c < width) columns.template operator()<1, false>(c);
    }
}

// Softmax attention of some heads over these entries: queries carry the scale. `scores` has room for a vector a key.
template <class C, class T>
inline void attend(int n_heads, const C* q_HW, int64_t width, const Entries<T>& entries, int64_t key_offset,
                   int64_t value_offset, int64_t value_width, C* scores_SH, C* out_HV) {
    const int64_t room = padded<C>(width), room_out = padded<C>(value_width);
    for (int first = 0; first < n_heads;) {
        auto with = [&]<int H>() {
            C sums_H[side_by_side<C>()];
            C* out = out_HV + first * room_out;
            score<C, T, H>(q_HW + first * room, width, entries, key_offset, value_offset - key_offset, scores_SH);
            soften(scores_SH, entries.n_keys(), sums_H);
            mix<C, T, H>(scores_SH, value_width, entries, value_offset, key_offset + width - value_offset, out);
            for (int h = 0; h < H; h++)
                for (int64_t c = 0; c < value_width; c++) out[h * room_out + c] /= sums_H[h];
            first += H;
        };
        const int left = n_heads - first;
        if (left >= 4) with.template operator()<4>();
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
#pragma GCC unroll 2
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
