// The weights of a model as the forward step wants them: packed once, in float or BF16.
// Letters: D width, E experts, F feed-forward width, H heads, C kv latent, N nope dim, V value dim.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "matrix.h"
#include "router.h"
#include "threads.h"

// What Python fills in: ModelConfig's fields under their own names, as engine/native.py has them.
struct AbyssalShape {
    int64_t vocab_size, hidden_size, n_layers, n_mtp, n_heads, intermediate_size, first_k_dense, is_moe;
    int64_t is_mla, q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, rope_interleave;
    int64_t latent_norm, n_kv_heads, head_dim, qk_norm;
    int64_t n_experts, n_shared, n_chosen, moe_width, n_group, topk_group, by_sigmoid, biased, by_groups, best_of_group;
    int64_t norm_topk, tied, block_size, router_block;
    double norm_eps, latent_eps, softmax_scale, routed_scaling;
};

namespace abyssal {

// Gate and up projections in one matrix, panel of the one beside panel of the other, so that who computes one has both.
template <class T>
struct SwiGLU {
    Matrix<T> gate_up, down;
    int64_t width = 0;

    void shape(Arena& arena, int64_t dim, int64_t inner, int64_t block_in, int64_t block_inner) {
        width = inner;
        gate_up.shape(arena, (inner + PANEL - 1) / PANEL * PANEL * 2, dim, block_in);
        down.shape(arena, dim, inner, block_inner);
    }
    // Where a row of gate_proj or up_proj goes.
    static int64_t place(int64_t row, bool is_up) { return (row / PANEL * 2 + is_up) * PANEL + row % PANEL; }
};

template <class T>
struct Layer {
    Buffer<float> input_norm, post_norm, q_norm, k_norm, latent_norm, query_norm;
    Matrix<T> first;   // q_a or q, and kv_a (MLA); q, k and v (GQA)
    Matrix<T> q_b, o;
    Buffer<float> w_uk_HNC, w_uv_HCV;  // both halves of kv_b, as absorbed attention multiplies with them
    SwiGLU<T> dense;                   // or the shared experts
    Matrix<float> gate;
    Buffer<float> gate_bias;
    std::unique_ptr<SwiGLU<T>[]> experts;
    bool is_moe = false;
};

template <class T>
struct Mtp {
    Buffer<float> enorm, hnorm, head_norm;
    Matrix<T> join;
};

template <class T>
struct Weights {
    AbyssalShape shape;
    Arena arena;
    std::map<int64_t, int64_t> sum_blocks;  // of products over so many inputs
    std::unique_ptr<Layer<T>[]> layers;     // MTP modules' at the end
    std::unique_ptr<Mtp<T>[]> mtp;
    Buffer<float> final_norm;
    Buffer<T> embedding;  // (vocabulary, D); empty when the head is tied to it
    Matrix<T> head;
    Router router;

    int64_t n_all() const { return shape.n_layers + shape.n_mtp; }
    int64_t query_width() const {
        return shape.n_heads * (shape.is_mla ? shape.qk_nope_head_dim + shape.qk_rope_head_dim : shape.head_dim);
    }
    int64_t entry_width() const {
        return shape.is_mla ? shape.kv_lora_rank + shape.qk_rope_head_dim : 2 * shape.n_kv_heads * shape.head_dim;
    }
    int64_t values_width() const { return shape.n_heads * (shape.is_mla ? shape.v_head_dim : shape.head_dim); }
    int64_t shared_width() const { return shape.n_shared * shape.moe_width; }

    void allocate(const AbyssalShape& given, std::map<int64_t, int64_t> blocks) {
        shape = given;
        sum_blocks = std::move(blocks);
        const int64_t D = shape.hidden_size;
        auto block = [&](int64_t k) { return sum_blocks.at(k); };
        layers = std::make_unique<Layer<T>[]>(n_all());
        mtp = std::make_unique<Mtp<T>[]>(shape.n_mtp);
        for (int64_t i = 0; i < n_all(); i++) {
            Layer<T>& layer = layers[i];
            layer.input_norm.sized(D);
            layer.post_norm.sized(D);
            const int64_t asked = shape.is_mla && shape.q_lora_rank ? shape.q_lora_rank : query_width();
            layer.first.shape(arena, asked + entry_width(), D, block(D));
            if (shape.is_mla) {
                const int64_t C = shape.kv_lora_rank;
                layer.latent_norm.sized(C);
                if (shape.q_lora_rank) {
                    layer.query_norm.sized(shape.q_lora_rank);
                    layer.q_b.shape(arena, query_width(), shape.q_lora_rank, block(shape.q_lora_rank));
                }
                layer.w_uk_HNC.sized(shape.n_heads * shape.qk_nope_head_dim * C);
                layer.w_uv_HCV.sized(shape.n_heads * shape.v_head_dim * C);
            } else {
                layer.q_norm.sized(shape.head_dim);
                layer.k_norm.sized(shape.head_dim);
            }
            layer.o.shape(arena, D, values_width(), block(values_width()));
            layer.is_moe = shape.is_moe && i >= shape.first_k_dense;
            if (!layer.is_moe) {
                layer.dense.shape(arena, D, shape.intermediate_size, block(D), block(shape.intermediate_size));
                continue;
            }
            layer.gate.shape(arena, shape.n_experts, D, shape.router_block);
            layer.gate_bias.sized(shape.n_experts);
            layer.experts = std::make_unique<SwiGLU<T>[]>(shape.n_experts);
            for (int64_t e = 0; e < shape.n_experts; e++)
                layer.experts[e].shape(arena, D, shape.moe_width, block(D), block(shape.moe_width));
            if (shape.n_shared) layer.dense.shape(arena, D, shared_width(), block(D), block(shared_width()));
        }
        for (int64_t k = 0; k < shape.n_mtp; k++) {
            for (Buffer<float>* norm : {&mtp[k].enorm, &mtp[k].hnorm, &mtp[k].head_norm}) norm->sized(D);
            mtp[k].join.shape(arena, D, 2 * D, block(2 * D));
        }
        final_norm.sized(D);
        head.shape(arena, shape.vocab_size, D, block(D));
        if (!shape.tied) embedding.sized(shape.vocab_size * D);
        router = {shape.n_experts, shape.n_chosen,       shape.n_group,         shape.topk_group, shape.by_sigmoid != 0,
                  shape.biased != 0, shape.by_groups != 0, shape.norm_topk != 0, shape.best_of_group, float(shape.routed_scaling)};
    }

    void embed(int64_t id, float* x_D) const {
        const int64_t D = shape.hidden_size;
        if (shape.tied) {
            const T* from = head.panel(id / PANEL) + id % PANEL;
            for (int64_t i = 0; i < D; i++) x_D[i] = number(from[i * PANEL]);
        } else {
            const T* from = embedding.get() + id * D;
            for (int64_t i = 0; i < D; i++) x_D[i] = number(from[i]);
        }
    }

    // One tensor of the state, by the end of its name. False when nothing here has that name.
    bool put(int64_t index, const std::string& name, const Source& from, Team& team) {
        const int64_t D = shape.hidden_size;
        auto vector = [&](Buffer<float>& to, int64_t n) {
            for (int64_t i = 0; i < n; i++) to.get()[i] = from[i];
            return true;
        };
        // rows of `from` beginning with `start`, to rows of `to` beginning with `first`
        auto rows = [&](auto& to, int64_t first, int64_t start, int64_t count) {
            spread(team, (count + PANEL - 1) / PANEL, [&](int64_t p) {
                for (int64_t r = p * PANEL; r < std::min(count, (p + 1) * PANEL); r++) to.put(first + r, from, start + r);
            });
            return true;
        };
        auto half = [&](SwiGLU<T>& to, bool is_up, int64_t start) {
            for (int64_t r = 0; r < to.width; r++) to.gate_up.put(to.place(r, is_up), from, start + r);
        };
        if (name == "embed_tokens.weight") {
            if (shape.tied) return rows(head, 0, 0, shape.vocab_size);
            for (int64_t i = 0; i < shape.vocab_size * D; i++) embedding.get()[i] = stored<T>(from[i]);
            return true;
        }
        if (name == "lm_head.weight") return rows(head, 0, 0, shape.vocab_size);
        if (name == "norm.weight") return vector(final_norm, D);
        if (index >= shape.n_layers) {
            Mtp<T>& module = mtp[index - shape.n_layers];
            if (name == "enorm.weight") return vector(module.enorm, D);
            if (name == "hnorm.weight") return vector(module.hnorm, D);
            if (name == "shared_head_norm.weight") return vector(module.head_norm, D);
            if (name == "eh_proj.weight") return rows(module.join, 0, 0, D);
        }
        Layer<T>& layer = layers[index];
        if (name == "input_layernorm.weight") return vector(layer.input_norm, D);
        if (name == "post_attention_layernorm.weight") return vector(layer.post_norm, D);
        if (name.starts_with("self_attn.")) return put_attention(layer, name.substr(10), from, rows, vector);
        if (name == "mlp.gate.weight") return rows(layer.gate, 0, 0, shape.n_experts);
        if (name == "mlp.gate.e_score_correction_bias") return vector(layer.gate_bias, shape.n_experts);
        if (name == "mlp.experts.gate_up_proj") {
            spread(team, shape.n_experts, [&](int64_t e) {
                half(layer.experts[e], false, e * 2 * shape.moe_width);
                half(layer.experts[e], true, (e * 2 + 1) * shape.moe_width);
            });
            return true;
        }
        if (name == "mlp.experts.down_proj") {
            spread(team, shape.n_experts, [&](int64_t e) {
                for (int64_t r = 0; r < D; r++) layer.experts[e].down.put(r, from, e * D + r);
            });
            return true;
        }
        const std::string own = layer.is_moe ? "mlp.shared_experts." : "mlp.";
        if (name == own + "gate_proj.weight") return half(layer.dense, false, 0), true;
        if (name == own + "up_proj.weight") return half(layer.dense, true, 0), true;
        if (name == own + "down_proj.weight") return rows(layer.dense.down, 0, 0, D);
        return false;
    }

  private:
    template <class Rows, class Vector>
    bool put_attention(Layer<T>& layer, const std::string& name, const Source& from, Rows rows, Vector vector) {
        const int64_t asked = query_width(), C = shape.kv_lora_rank, group = shape.n_kv_heads * shape.head_dim;
        auto bias = [&](int64_t first, int64_t count) { return layer.first.put_bias(first, from, count), true; };
        if (name == "o_proj.weight") return rows(layer.o, 0, 0, shape.hidden_size);
        if (name == "q_proj.weight") return rows(layer.first, 0, 0, asked);
        if (name == "q_proj.bias") return bias(0, asked);
        if (name == "k_proj.weight") return rows(layer.first, asked, 0, group);
        if (name == "v_proj.weight") return rows(layer.first, asked + group, 0, group);
        if (name == "k_proj.bias") return bias(asked, group);
        if (name == "v_proj.bias") return bias(asked + group, group);
        if (name == "q_norm.weight") return vector(layer.q_norm, shape.head_dim);
        if (name == "k_norm.weight") return vector(layer.k_norm, shape.head_dim);
        const int64_t kv_a = shape.q_lora_rank ? shape.q_lora_rank : asked;
        if (name == "q_a_proj.weight") return rows(layer.first, 0, 0, shape.q_lora_rank);
        if (name == "q_a_layernorm.weight") return vector(layer.query_norm, shape.q_lora_rank);
        if (name == "q_b_proj.weight") return rows(layer.q_b, 0, 0, asked);
        if (name == "kv_a_proj_with_mqa.weight") return rows(layer.first, kv_a, 0, entry_width());
        if (name == "kv_a_proj_with_mqa.bias") return bias(kv_a, entry_width());
        if (name == "kv_a_layernorm.weight") return vector(layer.latent_norm, C);
        if (name != "kv_b_proj.weight") return false;
        const int64_t N = shape.qk_nope_head_dim, V = shape.v_head_dim;
        for (int64_t h = 0; h < shape.n_heads; h++) {
            const int64_t start = h * (N + V) * C;
            for (int64_t i = 0; i < N * C; i++) layer.w_uk_HNC.get()[h * N * C + i] = rounded<T>(from[start + i]);
            for (int64_t v = 0; v < V; v++)
                for (int64_t c = 0; c < C; c++)
                    layer.w_uv_HCV.get()[(h * C + c) * V + v] = rounded<T>(from[start + (N + v) * C + c]);
        }
        return true;
    }

    template <class Work>
    static void spread(Team& team, int64_t n, const Work& work) {
        auto job = [&](int thread) { team.each(thread, n, work); };
        team.run(job);
    }
};

}  // namespace abyssal
