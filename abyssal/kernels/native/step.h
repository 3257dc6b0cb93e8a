// What one step is asked, as Python fills it in (engine/native.py).
// Letters: N tokens, R rows of the block table, W wanted tokens, D width, V vocabulary, K chosen experts.
#pragma once

#include <cstdint>

struct AbyssalStep {
    int64_t n_tokens, n_columns, n_wanted, module;  // module: -1 the main model, else an MTP module
    int64_t only_wanted;      // the others leave their entries and no more: no hidden state, no experts of the last layer
    const int64_t *ids_N, *positions_N, *rows_N, *blocks_RN, *wanted_W;
    void* const* caches;      // one (slots, entry width) a layer, MTP modules' at the end
    void* experts;            // (slots, MoE layers, K), uint8 or int16, or null
    int64_t experts_are_bytes;
    const float* hidden_in;   // (N, D), for a module
    float *hidden_out, *logits_WV;  // (N, D) after the final norm, or (W, D); or null
};
