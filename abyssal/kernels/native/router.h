// Which experts a token visits and how much each counts: Gate.forward of model/moe.py, for one token.
// Letters: E experts, K chosen, G groups.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"

namespace abyssal {

struct Router {
    int64_t n_experts = 0, n_chosen = 0, n_group = 1, topk_group = 1;
    bool by_sigmoid = true, biased = true, by_groups = false, normed = true;
    int64_t best_of_group = 2;  // V3 sums a group's two best, V2 takes its best
    float scaling = 1;
};

typedef std::vector<std::pair<float, int64_t>> Scored;

inline bool comes_first(const std::pair<float, int64_t>& x, const std::pair<float, int64_t>& y) {
    return (x.first != x.first && y.first == y.first) || x.first > y.first;
}

// The n largest in front, in the order in which torch's topk(sorted=False) leaves them on a CPU: the sum over experts
// then has the trainer's bits.
inline void choose(Scored& scored, int64_t n) {
    if (n * 64 <= int64_t(scored.size())) std::partial_sort(scored.begin(), scored.begin() + n, scored.end(), comes_first);
    else std::nth_element(scored.begin(), scored.begin() + n - 1, scored.end(), comes_first);
}

// logits_E are padded to whole vectors with anything and become scores. -> experts_K, weights_K.
inline void route(const Router& router, float* logits_E, const float* bias_E, int64_t* experts_K, float* weights_K,
                  Scored& scored, Scored& groups) {
    const int64_t n = router.n_experts;
    if (router.by_sigmoid) {
        for (int64_t e = 0; e < n; e += FLOATS) store(logits_E + e, sigmoid(load<Floats>(logits_E + e)));
    } else {
        float top = logits_E[0];
        for (int64_t e = 1; e < n; e++) top = logits_E[e] > top ? logits_E[e] : top;
        for (int64_t e = 0; e < n; e += FLOATS) store(logits_E + e, exp(load<Floats>(logits_E + e) - top));
        double sum = 0;
        for (int64_t e = 0; e < n; e++) sum += logits_E[e];
        for (int64_t e = 0; e < n; e++) logits_E[e] = float(logits_E[e] / sum);
    }
    scored.resize(n);
    for (int64_t e = 0; e < n; e++) scored[e] = {router.biased ? logits_E[e] + bias_E[e] : logits_E[e], e};
    if (router.by_groups) {
        const int64_t width = n / router.n_group, best = std::min(router.best_of_group, width);
        groups.resize(router.n_group);
        for (int64_t g = 0; g < router.n_group; g++) {
            float first = -std::numeric_limits<float>::infinity(), second = first;
            for (int64_t e = g * width; e < (g + 1) * width; e++) {
                const float x = scored[e].first;
                if (x > first) second = first, first = x;
                else if (x > second) second = x;
            }
            groups[g] = {best == 2 ? first + second : first, g};
        }
        choose(groups, router.topk_group);
        for (int64_t i = router.topk_group; i < router.n_group; i++)
            for (int64_t e = groups[i].second * width; e < (groups[i].second + 1) * width; e++)
                scored[e].first = -std::numeric_limits<float>::infinity();
    }
    choose(scored, router.n_chosen);
    float sum = 0;
    for (int64_t k = 0; k < router.n_chosen; k++) {
        experts_K[k] = scored[k].second;
        weights_K[k] = logits_E[scored[k].second];
        sum += weights_K[k];
    }
    for (int64_t k = 0; k < router.n_chosen; k++) {
        if (router.normed) weights_K[k] /= sum + 1e-20f;
        weights_K[k] *= router.scaling;
    }
}

}  // namespace abyssal
