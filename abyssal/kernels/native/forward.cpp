// The plain C face of the forward step: what ctypes calls. Nothing here throws: a failure is a message.
#include "forward.h"

#include <exception>

namespace {

#ifdef ABYSSAL_BF16
typedef abyssal::bf16 Number;
#else
typedef float Number;
#endif

struct Handle {
    abyssal::Forward<Number> forward{1};
    std::string error;

    template <class Work>
    int64_t guarded(const Work& work) {
        try {
            return work();
        } catch (const std::exception& failure) {
            error = failure.what();
            return -1;
        }
    }
};

Handle& open(void* handle) { return *static_cast<Handle*>(handle); }

}  // namespace

extern "C" {

// Null when there is no memory for it.
void* abyssal_new(const AbyssalShape* shape, int64_t n_inputs, const int64_t* inputs, const int64_t* sum_blocks) {
    try {
        auto handle = std::make_unique<Handle>();
        std::map<int64_t, int64_t> blocks;
        for (int64_t i = 0; i < n_inputs; i++) blocks[inputs[i]] = sum_blocks[i];
        handle->forward.w.allocate(*shape, blocks);
        return handle.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

void abyssal_free(void* handle) { delete &open(handle); }

// What went wrong in the call that returned -1.
const char* abyssal_error(void* handle) { return open(handle).error.c_str(); }

// 0, or 1 when the model has no such tensor.
int64_t abyssal_put(void* handle, int64_t layer, const char* name, const void* data, int64_t is_bf16, int64_t n_threads) {
    return open(handle).guarded([&]() -> int64_t {
        auto& forward = open(handle).forward;
        return forward.w.put(layer, name, {data, is_bf16 != 0}, forward.team(int(n_threads))) ? 0 : 1;
    });
}

int64_t abyssal_rope(void* handle, const float* cos, const float* sin, int64_t n_positions, int64_t half) {
    return open(handle).guarded([&]() -> int64_t {
        auto& forward = open(handle).forward;
        std::copy(cos, cos + n_positions * half, forward.cos.sized(n_positions * half));
        std::copy(sin, sin + n_positions * half, forward.sin.sized(n_positions * half));
        return 0;
    });
}

int64_t abyssal_forward(void* handle, const AbyssalStep* step, int64_t n_threads) {
    return open(handle).guarded([&]() -> int64_t {
        auto& forward = open(handle).forward;
        forward.run(*step, forward.team(int(n_threads)));
        return 0;
    });
}

int64_t abyssal_logits(void* handle, const float* hidden_ND, int64_t n, float* logits_NV, int64_t n_threads) {
    return open(handle).guarded([&]() -> int64_t {
        auto& forward = open(handle).forward;
        forward.logits(hidden_ND, n, logits_NV, forward.team(int(n_threads)));
        return 0;
    });
}

// (N, K) x (M, K)^T summed in blocks of `block`, to find the order in which torch sums on this machine.
int64_t abyssal_product(const float* x_NK, const float* w_MK, int64_t n, int64_t m, int64_t k, int64_t block, float* out_NM) {
    try {
        abyssal::Matrix<float> w;
        abyssal::Arena arena;
        w.shape(arena, m, k, block);
        for (int64_t row = 0; row < m; row++) w.put(row, {w_MK, false}, row);
        std::vector<const float*> rows(n);
        for (int64_t i = 0; i < n; i++) rows[i] = x_NK + i * k;
        abyssal::multiply(rows.data(), n, w, 0, w.n_panels, [&](int64_t r, int64_t p, const float* out) {
            for (int64_t i = 0; i < std::min<int64_t>(abyssal::PANEL, m - p * abyssal::PANEL); i++)
                out_NM[r * m + p * abyssal::PANEL + i] = out[i];
        });
        return 0;
    } catch (const std::exception&) {
        return -1;
    }
}

}  // extern "C"
