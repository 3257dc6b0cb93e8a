// Rows times a packed matrix. Every output is summed over k in one order, whatever the number of rows or threads and
// wherever the row stands: in blocks of `block` products, one fused multiply-add after the other within a block, then
// block after block, after the bias. That is also the order of MKL's products, so where `block` is the machine's own
// (see order_of_sums in engine/native.py) a row has the bits that torch gives it.
// Letters: N outputs, K inputs, P panels of 16 outputs.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "vectors.h"

namespace abyssal {

constexpr int PANEL = 16;              // outputs side by side in memory
constexpr int PARTS = PANEL / FLOATS;  // vectors of a panel
constexpr int AHEAD = 24;              // steps of k between asking for a panel's numbers and using them, of one tile alone
constexpr int MOST_ROWS = 6;           // rows of one tile: what the registers of AVX2 hold
constexpr int MOST_GROUP = 72;         // rows that pass over the panels together: they stay in the second cache

template <class S>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(at_); }
    // Room for n numbers; what was there is lost if it has to grow.
    S* sized(int64_t n) {
        if (n > size_) {
            std::free(at_);
            const size_t bytes = (size_t(n) * sizeof(S) + 127) / 64 * 64;
            at_ = static_cast<S*>(std::aligned_alloc(64, bytes));
            if (!at_) throw std::bad_alloc();
            std::memset(static_cast<void*>(at_), 0, bytes);
            size_ = n;
        }
        return at_;
    }
    S* get() const { return at_; }

  private:
    S* at_ = nullptr;
    int64_t size_ = 0;
};

// Memory for weights, zeros at first, side by side in huge pages where the system has them: a step reads all of it, and
// looking up small pages would take a good part of that time. What is taken lives as long as the arena.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() {
        for (const auto& [at, bytes] : chunks_) munmap(at, bytes);
    }
    template <class S>
    S* take(int64_t n) {
        const size_t bytes = (size_t(n) * sizeof(S) + 63) / 64 * 64;
        if (bytes > left_) add(bytes);
        char* at = next_;
        next_ += bytes, left_ -= bytes;
        return reinterpret_cast<S*>(at);
    }

  private:
    void add(size_t least) {
        constexpr size_t HUGE_PAGE = size_t(2) << 20, CHUNK = size_t(64) << 20;
        const size_t bytes = (std::max(least, CHUNK) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        chunks_.push_back({at, bytes});
#if defined(MADV_HUGEPAGE)
        madvise(at, bytes, MADV_HUGEPAGE);
#endif
        next_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
        left_ = size_t(static_cast<char*>(at) + bytes - next_);
    }
    std::vector<std::pair<void*, size_t>> chunks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

// Where numbers come from: a contiguous (rows, K) tensor of torch.
struct Source {
    const void* at;
    bool is_bf16;
    float operator[](int64_t i) const {
        return is_bf16 ? number(static_cast<const bf16*>(at)[i]) : static_cast<const float*>(at)[i];
    }
};

// (N, K) as panels: [P][K][16]. T is what the numbers are kept in.
template <class T>
struct Matrix {
    int64_t n = 0, k = 0, block = 0, n_panels = 0;
    T* panels = nullptr;  // in the arena
    Buffer<float> bias_N;
    bool has_bias = false;

    void shape(Arena& arena, int64_t outputs, int64_t inputs, int64_t sum_block) {
        n = outputs, k = inputs, block = sum_block, n_panels = (n + PANEL - 1) / PANEL;
        panels = arena.take<T>(n_panels * k * PANEL);
    }
    const T* panel(int64_t p) const { return panels + p * k * PANEL; }
    // One row of the matrix into its lane.
    void put(int64_t row, const Source& source, int64_t source_row) {
        T* to = panels + row / PANEL * k * PANEL + row % PANEL;
        if (source.is_bf16) {
            const bf16* from = static_cast<const bf16*>(source.at) + source_row * k;
            for (int64_t i = 0; i < k; i++) to[i * PANEL] = stored<T>(number(from[i]));
        } else {
            const float* from = static_cast<const float*>(source.at) + source_row * k;
            for (int64_t i = 0; i < k; i++) to[i * PANEL] = stored<T>(from[i]);
        }
    }
    void put_bias(int64_t first, const Source& source, int64_t count) {
        has_bias = true;
        float* to = bias_N.sized(n_panels * PANEL);
        for (int64_t i = 0; i < count; i++) to[first + i] = rounded<T>(source[i]);
    }
};

// Where a tile asks for numbers that are used later: `bytes` behind those of its first k, `step` further for each k.
struct Ahead {
    int64_t bytes, step;
};

// out[row][panel][16] of ROWS rows and SIDE panels, as far as the block of sums that begins with `start`.
template <class T, int ROWS, int SIDE>
inline void tile(const float* const* rows, const Matrix<T>& w, int64_t first, int64_t start, Ahead ahead, float* out) {
    constexpr int V = SIDE * PARTS;
    const float* a[ROWS];
    for (int r = 0; r < ROWS; r++) a[r] = rows[r] + start;
    const T* b[SIDE];
    for (int s = 0; s < SIDE; s++) b[s] = w.panel(first + s) + start * PANEL;
    const int64_t n = std::min(w.block, w.k - start);
    Floats sum[ROWS][V];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[r][v] = Floats{};
#pragma GCC unroll 2
    for (int64_t i = 0; i < n; i++) {
        for (int s = 0; s < SIDE; s++) __builtin_prefetch(reinterpret_cast<const char*>(b[s]) + ahead.bytes + i * ahead.step);
        Floats y[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) y[v] = load<Floats>(b[v / PARTS] + i * PANEL + v % PARTS * FLOATS);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const Floats x = all<Floats>(a[r][i]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[r][v] = fma(x, y[v], sum[r][v]);
        }
    }
    const float* bias = w.has_bias ? w.bias_N.get() + first * PANEL : nullptr;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float* to = out + (r * V + v) * FLOATS;
            if (start) sum[r][v] = load<Floats>(to) + sum[r][v];
            else if (bias) sum[r][v] = load<Floats>(bias + v * FLOATS) + sum[r][v];
            store(to, sum[r][v]);
        }
}

// Any number of rows and of panels that `panels_at_once` gives for it.
template <class T>
void tile_of(int64_t n_rows, int side, const float* const* rows, const Matrix<T>& w, int64_t first, int64_t start, Ahead ahead,
             float* out) {
    auto some = [&]<int ROWS, int SIDE>() { tile<T, ROWS, SIDE>(rows, w, first, start, ahead, out); };
    if (side == 8) return some.template operator()<1, 8>();
    if (side == 4) return some.template operator()<1, 4>();
    switch (n_rows * 2 + side - 1) {
        case 2: return some.template operator()<1, 1>();
        case 3: return some.template operator()<1, 2>();
        case 4: return some.template operator()<2, 1>();
        case 5: return some.template operator()<2, 2>();
        case 6: return some.template operator()<3, 1>();
        case 7: return some.template operator()<3, 2>();
        case 8: return some.template operator()<4, 1>();
        case 9: return some.template operator()<4, 2>();
        case 10: return some.template operator()<5, 1>();
        case 11: return some.template operator()<5, 2>();
        case 12: return some.template operator()<6, 1>();
        case 13: return some.template operator()<6, 2>();
    }
}

// Enough sums at a time to hide the time that each takes, and no more than the registers hold.
inline int panels_at_once(int64_t n_rows, int64_t left) {
    if (n_rows == 1 && PARTS == 1 && left >= 8) return 8;
    if (n_rows == 1 && left >= 4) return 4;
    return left >= 2 && (PARTS == 1 || n_rows <= 3) ? 2 : 1;
}

// The order in which MKL sums where there are few outputs, on a machine that has it so (`block` is FOUR_LANES): every
// fourth product in one sum, not fused, then the first and third together, the second and fourth, and both. For routers
// of few experts.
constexpr int64_t FOUR_LANES = -4;

template <class T, class Done>
void multiply_in_four_lanes(const float* const* rows, int64_t n_rows, const Matrix<T>& w, const Done& done) {
    alignas(64) float out[PANEL];
    for (int64_t p = 0; p < w.n_panels; p++)
        for (int64_t r = 0; r < n_rows; r++) {
            for (int part = 0; part < PARTS; part++) {
                Floats sum[4] = {};
                for (int64_t i = 0; i < w.k; i++)
                    sum[i % 4] += rows[r][i] * load<Floats>(w.panel(p) + i * PANEL + part * FLOATS);
                store(out + part * FLOATS, (sum[0] + sum[2]) + (sum[1] + sum[3]));
            }
            done(r, p, out);
        }
}

// Some rows times some panels. A block of a panel is read from memory once, by the first tile, and stays in the nearest
// cache for the others; each of them asks for its share of what comes next, so that memory never waits.
template <class T, class Done>
void multiply_group(const float* const* rows, int64_t n_rows, const Matrix<T>& w, int64_t first, int64_t end, const Done& done) {
    const int64_t n_tiles = (n_rows + MOST_ROWS - 1) / MOST_ROWS;
    constexpr int64_t LINE = PANEL * sizeof(T);
    alignas(64) float out[MOST_GROUP * 2 * PANEL];
    while (first < end) {
        const int side = panels_at_once(n_rows, end - first);
        for (int64_t start = 0; start < w.k; start += w.block) {
            const int64_t share = LINE / n_tiles + (n_tiles > 1), n = std::min(w.block, w.k - start);
            for (int64_t t = 0; t < n_tiles; t++) {
                const int64_t row = n_rows * t / n_tiles, count = n_rows * (t + 1) / n_tiles - row;
                const int64_t bytes = n_tiles == 1 ? AHEAD * LINE : n * (LINE + t * share);
                tile_of<T>(count, side, rows + row, w, first, start, {bytes, share}, out + row * side * PANEL);
            }
        }
        for (int64_t r = 0; r < n_rows; r++)
            for (int s = 0; s < side; s++) done(r, first + s, out + (r * side + s) * PANEL);
        first += side;
    }
}

// `done(row, panel, out16)` is told each row's 16 outputs of each panel from `first` to `end`, of a row in their order.
template <class T, class Done>
void multiply(const float* const* rows, int64_t n_rows, const Matrix<T>& w, int64_t first, int64_t end, const Done& done) {
    if (w.block == FOUR_LANES) return multiply_in_four_lanes(rows, n_rows, w, done);
    const int64_t n_groups = (n_rows + MOST_GROUP - 1) / MOST_GROUP;
    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t start = n_rows * g / n_groups, count = n_rows * (g + 1) / n_groups - start;
        multiply_group(rows + start, count, w, first, end,
                       [&](int64_t r, int64_t p, const float* out) { done(start + r, p, out); });
    }
}

}  // namespace abyssal
