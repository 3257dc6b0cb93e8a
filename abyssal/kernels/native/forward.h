// A step of the model: a flat list of tokens, each with its place in some sequence, through all layers. The same for
// prompts, drawn tokens, drafts to verify and MTP modules. A token's numbers depend on its own sequence alone.
//
// Activations are floats that hold what the compute type T holds: they are rounded where the layers of abyssal/model
// round. Only inside attention BF16 is not rounded to.
// Letters: N tokens, D width, H heads, W wanted tokens, K chosen experts, A assignments (N x K).
#pragma once

#include "attention.h"
#include "model.h"
#include "step.h"

namespace abyssal {

template <class T>
struct CoreOf { typedef float type; };
template <>
struct CoreOf<float> { typedef double type; };

constexpr int64_t PASS_TOKENS = 256;   // activations of a pass stay in the caches; a longer prompt takes several
constexpr int PIECE_HEADS = 8;         // that one thread takes at a time
constexpr int TOGETHER = 4;            // tokens that share what is absorbed

template <class T>
class Forward {
    typedef typename CoreOf<T>::type C;

  public:
    Weights<T> w;
    Buffer<float> cos, sin;  // (positions, rope width / 2)
    int64_t n_positions = 0;

    explicit Forward(int n_threads) : team_(std::make_unique<Team>(n_threads)) {}
    Team& team(int n_threads) {
        if (!team_->is_ours() || team_->size() != n_threads) team_ = std::make_unique<Team>(n_threads);
        return *team_;
    }

    void run(const AbyssalStep& step, Team& team) {
        prepare(team);
        int64_t wanted = 0;  // they come in rising order
        for (int64_t start = 0; start < step.n_tokens; start += PASS_TOKENS) {
            Pass pass = begin(step, start, wanted, team);
            auto job = [&](int thread) { forward(pass, team, thread); };
            team.run(job);
            wanted += pass.n_wanted;
        }
    }

    // (N, D) after the final norm -> (N, V)
    void logits(const float* hidden_ND, int64_t n, float* logits_NV, Team& team) {
        wanted_rows_.resize(n);
        for (int64_t i = 0; i < n; i++) wanted_rows_[i] = hidden_ND + i * shape().hidden_size;
        auto job = [&](int thread) { head(team, thread, n, logits_NV); };
        team.run(job);
    }

  private:
    // A piece of a product: some panels of one matrix for some rows.
    struct Piece {
        const SwiGLU<T>* ffn;
        const float* const* rows;
        int64_t n_rows, first_row, first, end;
        bool is_shared;
    };
    struct Pass {
        AbyssalStep step;  // of these tokens only
        int64_t n, n_wanted, longest, first_token;
    };
    struct Own {  // of one thread
        Buffer<C> queries, scores, mixed, nope, values;
        Buffer<float> logits_E;
        Entries<T> entries;
        Scored scored, groups;
    };

    std::unique_ptr<Team> team_;
    std::vector<Own> own_;
    Buffer<float> x_, y_, z_, q_, attended_, act_, shared_act_, y_AD_, y_shared_, joined_, weights_;
    std::vector<const float*> x_rows_, y_rows_, z_rows_, attended_rows_, act_rows_, shared_rows_, joined_rows_, of_expert_, wanted_rows_;
    std::vector<int64_t> experts_, place_, slots_, starts_, positions_, sequences_;
    Pass left_;  // of a pass, where only wanted tokens go on
    std::vector<Piece> pieces_;

    const AbyssalShape& shape() const { return w.shape; }
    static int64_t whole(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

    void prepare(Team& team) {
        if (int(own_.size()) != team.size()) own_ = std::vector<Own>(team.size());
    }

    Pass begin(const AbyssalStep& step, int64_t start, int64_t wanted, Team&) {
        const AbyssalShape& s = shape();
        Pass pass{step, std::min(PASS_TOKENS, step.n_tokens - start), 0, 0, start};
        pass.step.ids_N += start, pass.step.positions_N += start, pass.step.rows_N += start;
        while (wanted + pass.n_wanted < step.n_wanted && step.wanted_W[wanted + pass.n_wanted] < start + pass.n) pass.n_wanted++;
        pass.step.wanted_W += wanted;
        if (step.hidden_in) pass.step.hidden_in += start * s.hidden_size;
        if (step.hidden_out) pass.step.hidden_out += (step.only_wanted ? wanted : start) * s.hidden_size;
        if (step.logits_WV) pass.step.logits_WV += wanted * s.vocab_size;
        const int64_t n = pass.n, D = s.hidden_size;
        slots_.resize(n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t position = pass.step.positions_N[i];
            const int64_t* blocks = step.blocks_RN + pass.step.rows_N[i] * step.n_columns;
            slots_[i] = blocks[position / s.block_size] * s.block_size + position % s.block_size;
            pass.longest = std::max(pass.longest, position + 1);
        }
        auto rows = [&](std::vector<const float*>& to, Buffer<float>& from, int64_t count, int64_t width) {
            float* at = from.sized(count * width);
            to.resize(count);
            for (int64_t i = 0; i < count; i++) to[i] = at + i * width;
        };
        rows(x_rows_, x_, n, whole(D));
        rows(y_rows_, y_, n, whole(D));
        rows(z_rows_, z_, n, z_width());
        if (s.is_mla && s.q_lora_rank) q_.sized(n * whole(w.query_width()));
        rows(attended_rows_, attended_, n, whole(w.values_width()));
        if (s.n_mtp) rows(joined_rows_, joined_, n, 2 * D);
        const int64_t dense = std::max(s.intermediate_size, w.shared_width());
        rows(shared_rows_, shared_act_, n, whole(dense));
        if (s.is_moe) {
            const int64_t n_assigned = n * s.n_chosen;
            rows(act_rows_, act_, n_assigned, whole(s.moe_width));
            y_AD_.sized(n_assigned * whole(D));
            y_shared_.sized(n * whole(D));
            weights_.sized(n_assigned);
            experts_.resize(n_assigned), place_.resize(n_assigned), of_expert_.resize(n_assigned);
        }
        return pass;
    }
    int64_t z_width() const { return whole(w.layers[0].first.n); }

    static void norm(const float* x_D, const float* weight_D, int64_t n, float eps, float* out_D) {
        const float scale = 1.0f / std::sqrt(sum_of_squares(x_D, n) / float(n) + eps);
        for (int64_t i = 0; i < n; i++) out_D[i] = rounded<T>(x_D[i] * scale * weight_D[i]);
    }
    // Interleaved input leaves in half-split order, as in model/rope.py.
    void rotate(const float* x_R, int64_t width, int64_t position, bool interleaved, float* out_R) const {
        const int64_t half = width / 2;
        const float *c = cos.get() + position * half, *s = sin.get() + position * half;
        float turned[1024];
        float* to = half * 2 <= 1024 ? turned : out_R;
        for (int64_t i = 0; i < half; i++) {
            const float a = interleaved ? x_R[2 * i] : x_R[i], b = interleaved ? x_R[2 * i + 1] : x_R[i + half];
            to[i] = rounded<T>(a * c[i] - b * s[i]);
            to[i + half] = rounded<T>(b * c[i] + a * s[i]);
        }
        std::memcpy(out_R, to, size_t(width) * 4);
    }

    static void keep(const float* out, float* to) {
        for (int i = 0; i < PANEL; i++) to[i] = rounded<T>(out[i]);
    }

    // Products of all rows, some panels at a time.
    template <class S, class Done>
    void product(Team& team, int thread, const std::vector<const float*>& rows, int64_t n, const Matrix<S>& m, const Done& done) {
        const int64_t width = piece_width(n, m.n_panels, team.size()), count = (m.n_panels + width - 1) / width;
        team.each(thread, count, [&](int64_t i) {
            multiply(rows.data(), n, m, i * width, std::min((i + 1) * width, m.n_panels), done);
        });
    }
    // Panels of a piece, an even number: no fewer than a tile takes, and so few that no thread waits long for the last.
    static int64_t piece_width(int64_t n_rows, int64_t n_panels, int n_threads) {
        if (n_threads == 1) return std::max<int64_t>(n_panels, 1);
        const int64_t tile = n_rows == 1 ? (PARTS == 1 ? 8 : 4) : 2;
        return std::max(n_panels / (n_threads * 8) / tile * tile, tile);
    }

    void forward(const Pass& pass, Team& team, int thread) {
        const AbyssalShape& s = shape();
        const AbyssalStep& step = pass.step;
        const int64_t n = pass.n, D = s.hidden_size;
        if (step.module < 0) {
            team.each(thread, n, [&](int64_t i) { w.embed(step.ids_N[i], x_.get() + i * whole(D)); });
            int64_t moe_layer = 0;
            for (int64_t l = 0; l < s.n_layers; l++) {
                layer(pass, team, thread, l, moe_layer);
                moe_layer += w.layers[l].is_moe;
            }
            finish(step.only_wanted ? left_ : pass, team, thread, w.final_norm.get());
            return;
        }
        const Mtp<T>& module = w.mtp[step.module];
        team.each(thread, n, [&](int64_t i) {
            float* joined = joined_.get() + i * 2 * D;  // the embedding first, as released checkpoints have it
            w.embed(step.ids_N[i], joined);
            norm(joined, module.enorm.get(), D, float(s.norm_eps), joined);
            norm(step.hidden_in + i * D, module.hnorm.get(), D, float(s.norm_eps), joined + D);
        });
        product(team, thread, joined_rows_, n, module.join, [&](int64_t r, int64_t p, const float* out) {
            float* to = x_.get() + r * whole(D) + p * PANEL;
            keep(out, to);
        });
        layer(pass, team, thread, s.n_layers + step.module, -1);
        finish(pass, team, thread, module.head_norm.get());
    }

    void finish(const Pass& pass, Team& team, int thread, const float* norm_D) {
        const AbyssalShape& s = shape();
        const AbyssalStep& step = pass.step;
        const int64_t D = s.hidden_size;
        team.each(thread, pass.n, [&](int64_t i) {
            float* y = y_.get() + i * whole(D);
            norm(x_.get() + i * whole(D), norm_D, D, float(s.norm_eps), y);
            if (step.hidden_out) std::memcpy(step.hidden_out + i * D, y, size_t(D) * 4);
        });
        if (!step.logits_WV || !pass.n_wanted) return;
        team.each(thread, 1, [&](int64_t) {
            wanted_rows_.resize(pass.n_wanted);
            for (int64_t i = 0; i < pass.n_wanted; i++)
                wanted_rows_[i] = y_rows_[pass.n == pass.n_wanted ? i : step.wanted_W[i] - pass.first_token];
        });
        head(team, thread, pass.n_wanted, step.logits_WV);
    }

    void head(Team& team, int thread, int64_t n, float* logits_WV) {
        const int64_t width = shape().vocab_size;
        product(team, thread, wanted_rows_, n, w.head, [&](int64_t r, int64_t p, const float* out) {
            float* to = logits_WV + r * width + p * PANEL;
            const int64_t left = width - p * PANEL;
            if (left >= PANEL) keep(out, to);
            else for (int64_t i = 0; i < left; i++) to[i] = rounded<T>(out[i]);
        });
    }

    void layer(const Pass& pass, Team& team, int thread, int64_t index, int64_t moe_layer) {
        const AbyssalShape& s = shape();
        const Layer<T>& l = w.layers[index];
        const int64_t n = pass.n, D = s.hidden_size, ld = whole(D);
        T* cache = static_cast<T*>(pass.step.caches[index]);
        team.each(thread, n, [&](int64_t i) {
            norm(x_.get() + i * ld, l.input_norm.get(), D, float(s.norm_eps), y_.get() + i * ld);
        });
        product(team, thread, y_rows_, n, l.first, [&](int64_t r, int64_t p, const float* out) {
            float* to = z_.get() + r * z_width() + p * PANEL;
            keep(out, to);
        });
        team.each(thread, n, [&](int64_t i) { enter(pass, l, i, cache + slots_[i] * w.entry_width()); });
        if (pass.step.only_wanted && index == s.n_layers - 1) {
            team.each(thread, 1, [&](int64_t) { leave_the_wanted(pass); });
            return attend_and_feed(left_, team, thread, l, cache, moe_layer);
        }
        attend_and_feed(pass, team, thread, l, cache, moe_layer);
    }

    // Rows of the wanted tokens move up to the first places; they come in rising order.
    void leave_the_wanted(const Pass& pass) {
        left_ = pass;
        left_.n = pass.n_wanted;
        positions_.resize(left_.n), sequences_.resize(left_.n);
        for (int64_t i = 0; i < left_.n; i++) {
            const int64_t from = pass.step.wanted_W[i] - pass.first_token, ld = whole(shape().hidden_size);
            positions_[i] = pass.step.positions_N[from], sequences_[i] = pass.step.rows_N[from];
            std::memmove(x_.get() + i * ld, x_.get() + from * ld, size_t(ld) * 4);
            std::memmove(z_.get() + i * z_width(), z_.get() + from * z_width(), size_t(z_width()) * 4);
        }
        left_.step.positions_N = positions_.data(), left_.step.rows_N = sequences_.data();
    }

    // What of a layer stands behind its entries.
    void attend_and_feed(const Pass& pass, Team& team, int thread, const Layer<T>& l, T* cache, int64_t moe_layer) {
        const AbyssalShape& s = shape();
        const int64_t n = pass.n, D = s.hidden_size, ld = whole(D);
        if (s.is_mla && s.q_lora_rank)
            product(team, thread, z_rows_, n, l.q_b, [&](int64_t r, int64_t p, const float* out) {
                float* to = q_.get() + r * whole(w.query_width()) + p * PANEL;
                keep(out, to);
            });
        attention(pass, team, thread, l, cache);
        auto add = [&](int64_t r, int64_t p, const float* out) {
            float* to = x_.get() + r * ld + p * PANEL;
            for (int i = 0; i < PANEL; i++) to[i] = rounded<T>(to[i] + rounded<T>(out[i]));
        };
        product(team, thread, attended_rows_, n, l.o, add);
        if (l.is_moe) return experts(pass, team, thread, l, moe_layer);
        team.each(thread, n, [&](int64_t i) {
            norm(x_.get() + i * ld, l.post_norm.get(), D, float(s.norm_eps), y_.get() + i * ld);
        });
        const int64_t width = whole(std::max(s.intermediate_size, w.shared_width()));
        product(team, thread, y_rows_, n, l.dense.gate_up, swiglu(shared_act_.get(), width));
        product(team, thread, shared_rows_, n, l.dense.down, add);
    }

    // Gate's panel comes first and is kept where the product of both will be.
    static auto swiglu(float* act, int64_t width) {
        return [=](int64_t r, int64_t p, const float* out) {
            float* to = act + r * width + p / 2 * PANEL;
            for (int i = 0; i < PANEL; i += FLOATS) {
                if (p % 2 == 0) {
                    store(to + i, load<Floats>(out + i));
                } else if (sizeof(T) == 4) {
                    store(to + i, silu(load<Floats>(to + i)) * load<Floats>(out + i));
                } else {
                    float gate[FLOATS];
                    for (int j = 0; j < FLOATS; j++) gate[j] = rounded<T>(to[i + j]);
                    store(gate, silu(load<Floats>(gate)));
                    for (int j = 0; j < FLOATS; j++) to[i + j] = rounded<T>(rounded<T>(gate[j]) * rounded<T>(out[i + j]));
                }
            }
        };
    }

    // What a token leaves in the cache; its queries get their norms, and in GQA their turn.
    void enter(const Pass& pass, const Layer<T>& l, int64_t i, T* entry) {
        const AbyssalShape& s = shape();
        const int64_t position = pass.step.positions_N[i];
        float* z = z_.get() + i * z_width();
        if (s.is_mla) {
            const int64_t latent = s.kv_lora_rank, width = s.qk_rope_head_dim;
            float* kv = z + (s.q_lora_rank ? s.q_lora_rank : w.query_width());
            if (s.q_lora_rank) norm(z, l.query_norm.get(), s.q_lora_rank, float(s.latent_eps), z);
            if (s.latent_norm) norm(kv, l.latent_norm.get(), latent, float(s.latent_eps), kv);
            rotate(kv + latent, width, position, s.rope_interleave, kv + latent);
            for (int64_t c = 0; c < latent + width; c++) entry[c] = stored<T>(kv[c]);
            return;
        }
        const int64_t width = s.head_dim;
        for (int64_t h = 0; h < s.n_heads + s.n_kv_heads; h++) {
            float* head = z + h * width;
            if (s.qk_norm) norm(head, (h < s.n_heads ? l.q_norm : l.k_norm).get(), width, float(s.norm_eps), head);
            rotate(head, width, position, false, head);
        }
        const float* kv = z + w.query_width();
        for (int64_t c = 0; c < w.entry_width(); c++) entry[c] = stored<T>(kv[c]);
    }

    void attention(const Pass& pass, Team& team, int thread, const Layer<T>& l, T* cache) {
        const AbyssalShape& s = shape();
        const int64_t n = pass.n, sharing = s.is_mla ? s.n_heads : s.n_heads / s.n_kv_heads;
        // a piece: a few tokens, some heads that share keys. Few tokens: each head group is cut up among the threads
        const int64_t together = s.is_mla && n >= TOGETHER * team.size() ? TOGETHER : 1;
        const int64_t n_groups = s.is_mla ? 1 : s.n_kv_heads, n_blocks = (n + together - 1) / together;
        const int64_t cuts = n_blocks * n_groups < team.size() ? team.size() : 1;
        const int64_t heads = std::min<int64_t>((sharing + cuts - 1) / cuts, PIECE_HEADS), parts = (sharing + heads - 1) / heads;
        team.each(thread, n_blocks * n_groups * parts, [&](int64_t piece) {
            const int64_t part = piece % parts, group = piece / parts % n_groups, first = piece / parts / n_groups * together;
            const int64_t start = part * heads, count = std::min(heads, sharing - start);
            const int n_tokens = int(std::min(together, n - first));
            if (s.is_mla) latent_piece(pass, l, cache, first, n_tokens, start, int(count), own_[thread]);
            else group_piece(pass, cache, first, group, group * sharing + start, int(count), own_[thread]);
        });
    }

    // All that a token attends to.
    const Entries<T>& entries(const Pass& pass, const T* cache, int64_t token, Own& own) const {
        const int64_t* blocks = pass.step.blocks_RN + pass.step.rows_N[token] * pass.step.n_columns;
        own.entries.find(cache, blocks, shape().block_size, w.entry_width(), pass.step.positions_N[token] + 1);
        return own.entries;
    }

    void group_piece(const Pass& pass, T* cache, int64_t token, int64_t group, int64_t head, int count, Own& own) {
        const AbyssalShape& s = shape();
        const int64_t width = s.head_dim, room = padded<C>(width);
        C* q = own.queries.sized(count * room);
        C* scores = own.scores.sized(side_by_side<C>() * pass.longest);
        C* mixed = own.mixed.sized(count * room);
        for (int h = 0; h < count; h++) {
            const float* from = z_.get() + token * z_width() + (head + h) * width;
            for (int64_t i = 0; i < width; i++) q[h * room + i] = C(from[i]) * C(s.softmax_scale);
            for (int64_t i = width; i < room; i++) q[h * room + i] = 0;
        }
        attend<C, T>(count, q, width, entries(pass, cache, token, own), group * width, (s.n_kv_heads + group) * width, width, scores, mixed);
        for (int h = 0; h < count; h++) {
            float* to = attended_.get() + token * whole(w.values_width()) + (head + h) * width;
            for (int64_t i = 0; i < width; i++) to[i] = rounded<T>(float(mixed[h * room + i]));
        }
    }

    // Absorbed: W_UK goes into the query and W_UV into the output, each head attends to the latent itself.
    void latent_piece(const Pass& pass, const Layer<T>& l, T* cache, int64_t first, int n_tokens, int64_t head, int count, Own& own) {
        const AbyssalShape& s = shape();
        const int64_t nope = s.qk_nope_head_dim, rope = s.qk_rope_head_dim, latent = s.kv_lora_rank, V = s.v_head_dim;
        const int64_t width = latent + rope, room = padded<C>(width), room_out = padded<C>(latent);
        C* q = own.queries.sized(TOGETHER * PIECE_HEADS * room);
        C* scores = own.scores.sized(side_by_side<C>() * pass.longest);
        C* mixed = own.mixed.sized(TOGETHER * PIECE_HEADS * room_out);
        C* from = own.nope.sized(TOGETHER * std::max<int64_t>(nope, 1));
        C* values = own.values.sized(TOGETHER * V);
        const C* in[TOGETHER];
        C* out[TOGETHER];
        float turned[1024];
        for (int h = 0; h < count; h++) {
            for (int t = 0; t < n_tokens; t++) {
                const float* own_q = s.q_lora_rank ? q_.get() + (first + t) * whole(w.query_width()) : z_.get() + (first + t) * z_width();
                own_q += (head + h) * (nope + rope);
                for (int64_t i = 0; i < nope; i++) from[t * nope + i] = own_q[i];
                in[t] = from + t * nope, out[t] = q + (t * PIECE_HEADS + h) * room;
                rotate(own_q + nope, rope, pass.step.positions_N[first + t], s.rope_interleave, turned);
                for (int64_t i = 0; i < rope; i++) out[t][latent + i] = turned[i];
                for (int64_t i = width; i < room; i++) out[t][i] = 0;
            }
            small_products<C>(in, n_tokens, l.w_uk_HNC.get() + (head + h) * nope * latent, nope, latent, out);
            for (int t = 0; t < n_tokens; t++)
                for (int64_t i = 0; i < width; i++) out[t][i] *= C(s.softmax_scale);
        }
        for (int t = 0; t < n_tokens; t++)
            attend<C, T>(count, q + t * PIECE_HEADS * room, width, entries(pass, cache, first + t, own), 0, 0, latent, scores,
                         mixed + t * PIECE_HEADS * room_out);
        for (int h = 0; h < count; h++) {
            for (int t = 0; t < n_tokens; t++) in[t] = mixed + (t * PIECE_HEADS + h) * room_out, out[t] = values + t * V;
            small_products<C>(in, n_tokens, l.w_uv_HCV.get() + (head + h) * latent * V, latent, V, out);
            for (int t = 0; t < n_tokens; t++) {
                float* to = attended_.get() + (first + t) * whole(w.values_width()) + (head + h) * V;
                for (int64_t v = 0; v < V; v++) to[v] = rounded<T>(float(values[t * V + v]));
            }
        }
    }

    void experts(const Pass& pass, Team& team, int thread, const Layer<T>& l, int64_t moe_layer) {
        const AbyssalShape& s = shape();
        const int64_t n = pass.n, D = s.hidden_size, ld = whole(D), K = s.n_chosen;
        team.each(thread, (n + TOGETHER - 1) / TOGETHER, [&](int64_t block) {
            const int64_t first = block * TOGETHER, count = std::min<int64_t>(TOGETHER, n - first), room = whole(s.n_experts);
            float* logits = own_[thread].logits_E.sized(TOGETHER * room);
            for (int64_t i = first; i < first + count; i++)
                norm(x_.get() + i * ld, l.post_norm.get(), D, float(s.norm_eps), y_.get() + i * ld);
            multiply(y_rows_.data() + first, count, l.gate, 0, l.gate.n_panels, [&](int64_t r, int64_t p, const float* out) {
                std::memcpy(logits + r * room + p * PANEL, out, PANEL * 4);
            });
            for (int64_t i = first; i < first + count; i++) {
                route(w.router, logits + (i - first) * room, l.gate_bias.get(), experts_.data() + i * K, weights_.get() + i * K,
                      own_[thread].scored, own_[thread].groups);
                if (pass.step.experts && moe_layer >= 0) note(pass, i, moe_layer);
            }
        });
        team.each(thread, 1, [&](int64_t) { sort_by_expert(n, l, team.size()); });
        const int64_t act_width = whole(s.moe_width), shared_width = whole(std::max(s.intermediate_size, w.shared_width()));
        team.each(thread, int64_t(pieces_.size()), [&](int64_t i) {
            const Piece& piece = pieces_[i];
            float* act = piece.is_shared ? shared_act_.get() : act_.get() + piece.first_row * act_width;
            multiply(piece.rows, piece.n_rows, piece.ffn->gate_up, piece.first, piece.end, swiglu(act, piece.is_shared ? shared_width : act_width));
        });
        team.each(thread, 1, [&](int64_t) { cut_down_projections(team.size()); });
        team.each(thread, int64_t(pieces_.size()), [&](int64_t i) {
            const Piece& piece = pieces_[i];
            float* y = piece.is_shared ? y_shared_.get() : y_AD_.get() + piece.first_row * ld;
            multiply(piece.rows, piece.n_rows, piece.ffn->down, piece.first, piece.end, [&](int64_t r, int64_t p, const float* out) {
                float* to = y + r * ld + p * PANEL;
                keep(out, to);
            });
        });
        team.each(thread, n, [&](int64_t i) {
            float* x = x_.get() + i * ld;
            for (int64_t d = 0; d < D; d++) {
                float sum = 0;
                for (int64_t k = 0; k < K; k++) sum += y_AD_.get()[place_[i * K + k] * ld + d] * weights_.get()[i * K + k];
                sum = rounded<T>(sum);
                if (s.n_shared) sum = rounded<T>(sum + y_shared_.get()[i * ld + d]);
                x[d] = rounded<T>(x[d] + sum);
            }
        });
    }

    void note(const Pass& pass, int64_t i, int64_t moe_layer) {
        const int64_t K = shape().n_chosen, n_moe = shape().n_layers - std::min(shape().first_k_dense, shape().n_layers);
        const int64_t at = (slots_[i] * n_moe + moe_layer) * K;
        for (int64_t k = 0; k < K; k++) {
            const int64_t expert = experts_[i * K + k];
            if (pass.step.experts_are_bytes) static_cast<uint8_t*>(pass.step.experts)[at + k] = uint8_t(expert);
            else static_cast<int16_t*>(pass.step.experts)[at + k] = int16_t(expert);
        }
    }

    // Assignments side by side by expert, tokens in their order; then the pieces of the first products.
    void sort_by_expert(int64_t n, const Layer<T>& l, int n_threads) {
        const AbyssalShape& s = shape();
        const int64_t K = s.n_chosen;
        starts_.assign(s.n_experts + 1, 0);
        for (int64_t a = 0; a < n * K; a++) starts_[experts_[a] + 1]++;
        for (int64_t e = 0; e < s.n_experts; e++) starts_[e + 1] += starts_[e];
        std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
        for (int64_t a = 0; a < n * K; a++) {
            place_[a] = next[experts_[a]]++;
            of_expert_[place_[a]] = y_rows_[a / K];
        }
        pieces_.clear();
        if (s.n_shared) cut(l.dense, y_rows_.data(), n, 0, l.dense.gate_up.n_panels, n_threads, true);
        for (int64_t e = 0; e < s.n_experts; e++)
            if (const int64_t count = starts_[e + 1] - starts_[e])
                cut(l.experts[e], of_expert_.data() + starts_[e], count, starts_[e], l.experts[e].gate_up.n_panels, n_threads, false);
    }

    void cut_down_projections(int n_threads) {
        std::vector<Piece> before;
        before.swap(pieces_);
        const SwiGLU<T>* last = nullptr;
        for (const Piece& piece : before) {
            if (piece.ffn == last) continue;
            last = piece.ffn;
            const float* const* rows = piece.is_shared ? shared_rows_.data() : act_rows_.data() + piece.first_row;
            cut(*last, rows, piece.n_rows, piece.first_row, last->down.n_panels, n_threads, piece.is_shared);
        }
    }

    void cut(const SwiGLU<T>& ffn, const float* const* rows, int64_t n_rows, int64_t first_row, int64_t n_panels, int n_threads, bool is_shared) {
        const int64_t width = n_threads == 1 ? n_panels : 8;
        for (int64_t p = 0; p < n_panels; p += width)
            pieces_.push_back({&ffn, rows, n_rows, first_row, p, std::min(p + width, n_panels), is_shared});
    }
};

}  // namespace abyssal
