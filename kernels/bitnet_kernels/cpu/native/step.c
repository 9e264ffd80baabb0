/* The whole model in one call: a step of the decoder, or a prefill.
 *
 * All threads run through the layers together and wait for each other after each product. There is
 * little work between two products. With one token each thread does all of it for itself, which is
 * faster than to wait; with more tokens, each thread takes some of them.
 *
 * A token passes through the operators of bitnet_kernels/reference.py: rmsnorm, quant, the ternary
 * product and its rescale, rope, attention. All but attention, silu and dense matrices give the
 * same bits as there.
 *
 * M tokens, D d_model, H query heads, G key-value heads, E head_dim, F d_ff, K = max(D, F).
 */
#include <string.h>

#include "internal.h"

/* Tokens whose attention is computed together, in a prefill. */
#define BLOCK 32

/* Consecutive tokens of one row. */
typedef struct {
    int64_t first, count;
} block;

/* The state of a call. Buffers are parts of the workspace. */
typedef struct {
    const bn_model *model;
    const bn_isa *isa;
    int64_t m, n_blocks, n_out;
    const int64_t *token; /* [M] */
    int64_t *row, *column; /* [M] */
    int64_t *out; /* [n_out], the tokens whose logits are wanted */
    block *blocks; /* [n_blocks] */
    float *x; /* [M, D], the residual stream */
    float *y; /* [M, K], the input of a product */
    float *z; /* [M, max((H + 2G) E, 2 F)], its output */
    bn_tokens tokens; /* the input of a product, quantized */
    char *scratch; /* scratch_bytes per thread */
    size_t scratch_bytes;
} call;

static size_t aligned(size_t bytes) { return (bytes + BN_CACHE_LINE - 1) / BN_CACHE_LINE * BN_CACHE_LINE; }

static int64_t widest(const bn_model *model) {
    return model->d_model > model->d_ff ? model->d_model : model->d_ff;
}

/* Take `bytes` of the workspace; with `base` NULL only count them. */
static void *take(char *base, size_t *used, size_t bytes) {
    void *part = base == NULL ? NULL : base + *used;
    *used += aligned(bytes);
    return part;
}

/* Lay out the workspace; returns its bytes. */
static size_t lay_out(const bn_model *model, call *c) {
    size_t used = 0, m = (size_t)model->most, k = (size_t)widest(model);
    size_t heads = (size_t)((model->n_heads + 2 * model->n_kv_heads) * model->head_dim);
    size_t outer = heads > 2 * (size_t)model->d_ff ? heads : 2 * (size_t)model->d_ff;
    /* Start at a cache line: Python's memory may begin anywhere. */
    char *base = model->workspace;
    if (base != NULL) base += aligned((uintptr_t)base) - (uintptr_t)base;
    c->row = take(base, &used, m * sizeof *c->row);
    c->column = take(base, &used, m * sizeof *c->column);
    c->out = take(base, &used, m * sizeof *c->out);
    c->blocks = take(base, &used, m * sizeof *c->blocks);
    c->x = take(base, &used, m * (size_t)model->d_model * sizeof(float));
    c->y = take(base, &used, m * k * sizeof(float));
    c->z = take(base, &used, m * outer * sizeof(float));
    c->tokens.codes = take(base, &used, m * (size_t)bn_padded((int64_t)k));
    c->tokens.bits = take(base, &used, m * (size_t)bn_padded((int64_t)k));
    c->tokens.scale = take(base, &used, m * sizeof(float));
    c->tokens.sum = take(base, &used, m * sizeof(int32_t));
    /* Per thread: space for one token, and the scratch of a product or attention. */
    size_t product = bn_linear_scratch((int64_t)k), attend = bn_attend_scratch(model->columns, BLOCK);
    size_t own = aligned(k * sizeof(float)) + 2 * (size_t)bn_padded((int64_t)k) + 2 * BN_CACHE_LINE;
    c->scratch_bytes = aligned(own + (product > attend ? product : attend));
    c->scratch = take(base, &used, c->scratch_bytes * (size_t)model->threads);
    return used + BN_CACHE_LINE;
}

int64_t bn_workspace(const bn_model *model) {
    call c;
    bn_model without = *model;
    without.workspace = NULL;
    return (int64_t)lay_out(&without, &c);
}

/* Inputs of a product, as a thread sees them: of all tokens, or its own copy of the only token. */
typedef struct {
    float *y;
    bn_tokens tokens;
    void *scratch;
    bool own;
} view;

static view inputs(const call *c, const bn_team *team) {
    char *scratch = c->scratch + c->scratch_bytes * (size_t)team->index;
    int64_t k = widest(c->model);
    view v = {.own = c->m == 1};
    v.y = v.own ? (float *)scratch : c->y;
    scratch += aligned((size_t)k * sizeof(float));
    v.tokens = c->tokens;
    if (v.own) v.tokens.codes = (int8_t *)scratch;
    scratch += bn_padded(k);
    if (v.own) v.tokens.bits = (uint64_t *)scratch;
    scratch += bn_padded(k);
    if (v.own) v.tokens.scale = (float *)scratch, v.tokens.sum = (int32_t *)(scratch + BN_CACHE_LINE);
    v.scratch = scratch + 2 * BN_CACHE_LINE;
    return v;
}

/* What a product reads of its input: the floats, their codes, or the codes and their bits. */
typedef enum { FLOATS, CODES, BITS } form;

static form form_of(const bn_matrix *w) {
    return w->kind == BN_MATRIX_ADDSUB ? BITS : w->kind >= BN_MATRIX_I8 ? CODES : FLOATS;
}

static form most_of(form a, form b) { return a > b ? a : b; }

/* This thread's tokens. */
static void tokens_of(const bn_team *team, const view *v, int64_t m, int64_t *begin, int64_t *end) {
    *begin = 0;
    *end = m;
    if (!v->own) bn_share(team, m, 1, begin, end);
}

/* Convert token i of v->y, of k channels, to the form that a product reads. */
static void formed(const call *c, view *v, int64_t i, int64_t k, form f) {
    v->tokens.stride = bn_padded(k);
    if (f >= CODES)
        c->isa->rows->quant(
            v->y + i * k, k, v->tokens.codes + i * v->tokens.stride, v->tokens.stride,
            v->tokens.scale + i, v->tokens.sum + i
        );
    if (f == BITS) c->isa->products->bits(&v->tokens, i, i + 1);
}

/* The input of a product: norm(x), x [m, k]. */
static void normed(
    const call *c, const bn_team *team, view *v, const float *x, const bn_norm *norm, int64_t m,
    int64_t k, form f
) {
    int64_t begin, end;
    tokens_of(team, v, m, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        float *y = v->y + i * k;
        if (norm->weight != NULL)
            c->isa->rows->rmsnorm(x + i * k, norm->weight, norm->eps, k, y);
        else if (y != x + i * k)
            memcpy(y, x + i * k, (size_t)k * sizeof *y);
        formed(c, v, i, k, f);
    }
    v->tokens.stride = bn_padded(k);
    if (!v->own) bn_wait(team);
}

/* out [m, ld] = y W^T, or out += y W^T: this thread's columns. */
static void product(
    const call *c, const bn_team *team, const view *v, const bn_matrix *w, int64_t m, float *out,
    int64_t ld, bool add
) {
    if (w->kind >= BN_MATRIX_PACKED) {
        bool dot = w->kind == BN_MATRIX_PACKED, planes = w->kind == BN_MATRIX_ADDSUB;
        bn_ternary t = {
            .n = w->n, .k = w->k, .packed = planes ? NULL : w->weight,
            .planes = planes ? w->weight : NULL, .scale = w->scale,
            .scale_stride = w->scale_stride
        };
        bn_product *family = dot ? c->isa->products->dot : c->isa->products->addsub;
        bn_linear_share(team, family, &t, &v->tokens, m, out, ld, add, v->scratch);
        return;
    }
    int64_t begin, end;
    bn_share(team, w->n, 16, &begin, &end);
    bn_dense d = {.n = w->n, .k = w->k, .dtype = (bn_dtype)w->kind, .weight = w->weight, .scale = w->scale};
    if (w->kind == BN_MATRIX_I8)
        c->isa->rows->dense_int8(&d, &v->tokens, m, begin, end, out + begin, ld);
    else if (!add)
        c->isa->rows->dense(&d, v->y, w->k, m, begin, end, out + begin, ld);
    else { /* through the scratch, which has the size of a ternary block */
        float *block = v->scratch;
        for (int64_t n = begin; n < end; n += BN_ROWS) {
            int64_t rows = end - n < BN_ROWS ? end - n : BN_ROWS;
            for (int64_t i = 0; i < m; i += BN_TOKENS) {
                int64_t count = m - i < BN_TOKENS ? m - i : BN_TOKENS;
                c->isa->rows->dense(&d, v->y + i * w->k, w->k, count, n, n + rows, block, rows);
                for (int64_t a = 0; a < count; a++)
                    for (int64_t b = 0; b < rows; b++)
                        out[(i + a) * ld + n + b] += block[a * rows + b];
            }
        }
    }
}

static bn_cache cache_of(const bn_model *model, int64_t layer, int64_t row, int64_t g) {
    int64_t e = model->head_dim, l = model->columns;
    int64_t at = ((2 * layer * model->rows + row) * model->n_kv_heads + g) * l;
    int64_t values = model->rows * model->n_kv_heads * l; /* from keys to values */
    int64_t bytes = model->cache_kind == BN_MATRIX_F32 ? 4 : model->cache_kind == BN_MATRIX_I8 ? 1 : 2;
    char *kv = model->kv;
    float *scale = model->kv_scale;
    return (bn_cache){
        .dtype = (bn_dtype)model->cache_kind, .e = e, .k = kv + at * e * bytes,
        .v = kv + (at + values) * e * bytes, .k_scale = scale == NULL ? NULL : scale + at,
        .v_scale = scale == NULL ? NULL : scale + at + values
    };
}

/* Norm and rotate the queries and the key of group g of token i, and append key and value. */
static void append(const call *c, const bn_layer *layer, int64_t index, int64_t i, int64_t g) {
    const bn_model *model = c->model;
    const bn_rows *rows = c->isa->rows;
    int64_t e = model->head_dim, h = model->n_heads, groups = model->n_kv_heads, r = h / groups;
    const float *cos = model->cos + c->column[i] * e, *sin = model->sin + c->column[i] * e;
    float *qkv = c->z + i * (h + 2 * groups) * e, *key = qkv + (h + g) * e;
    for (int64_t head = g * r; head < (g + 1) * r; head++) {
        float *q = qkv + head * e;
        if (layer->q_norm.weight != NULL)
            rows->rmsnorm(q, layer->q_norm.weight, layer->q_norm.eps, e, q);
        rows->rotate(q, cos, sin, e, q);
    }
    if (layer->k_norm.weight != NULL)
        rows->rmsnorm(key, layer->k_norm.weight, layer->k_norm.eps, e, key);
    rows->rotate(key, cos, sin, e, key);
    bn_cache cache = cache_of(model, index, c->row[i], g);
    rows->append(&cache, c->column[i], key, qkv + (h + groups + g) * e);
}

/* z [M, (H + 2G) E] -> the cache and y [M, H E]. */
static void attention(const call *c, const bn_team *team, const bn_layer *layer, int64_t index, void *scratch) {
    const bn_model *model = c->model;
    int64_t e = model->head_dim, h = model->n_heads, groups = model->n_kv_heads, r = h / groups;
    int64_t stride = (h + 2 * groups) * e, last[BLOCK];
    bool alone = c->n_blocks == c->m; /* no token sees another one of this call */
    if (!alone) {
        for (int64_t item = team->index; item < c->m * groups; item += team->size)
            append(c, layer, index, item / groups, item % groups);
        bn_wait(team);
    }
    for (int64_t item = team->index; item < c->n_blocks * groups; item += team->size) {
        block b = c->blocks[item / groups];
        int64_t g = item % groups;
        if (alone) append(c, layer, index, b.first, g);
        bn_cache cache = cache_of(model, index, c->row[b.first], g);
        const float *q = c->z + b.first * stride + g * r * e;
        float *y = c->y + b.first * h * e + g * r * e;
        if (b.count == 1) { /* the heads of a group together, to read keys and values once */
            for (int64_t done = 0; done < r; done += BLOCK) {
                int64_t count = r - done < BLOCK ? r - done : BLOCK;
                for (int64_t j = 0; j < count; j++) last[j] = c->column[b.first];
                c->isa->rows->attend(&cache, q + done * e, e, last, count, y + done * e, e, scratch);
            }
            continue;
        }
        for (int64_t j = 0; j < b.count; j++) last[j] = c->column[b.first + j];
        for (int64_t head = 0; head < r; head++)
            c->isa->rows->attend(
                &cache, q + head * e, stride, last, b.count, y + head * e, h * e, scratch
            );
    }
}

/* The middle of the MLP: z [M, 2F] (gate, up) -> the view. */
static void gated(const call *c, const bn_team *team, view *v, const bn_layer *layer) {
    int64_t f = c->model->d_ff, begin, end;
    tokens_of(team, v, c->m, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const float *gate = c->z + i * 2 * f;
        float *y = v->y + i * f;
        (c->model->relu2 ? c->isa->rows->relu2_mul : c->isa->rows->silu_mul)(gate, gate + f, f, y);
        if (layer->ffn_norm.weight != NULL)
            c->isa->rows->rmsnorm(y, layer->ffn_norm.weight, layer->ffn_norm.eps, f, y);
        formed(c, v, i, f, form_of(&layer->down));
    }
    v->tokens.stride = bn_padded(f);
    if (!v->own) bn_wait(team);
}

static void run_layer(const call *c, const bn_team *team, view *v, int64_t index) {
    const bn_model *model = c->model;
    const bn_layer *l = model->layers + index;
    int64_t d = model->d_model, f = model->d_ff, m = c->m, e = model->head_dim;
    int64_t heads = (model->n_heads + 2 * model->n_kv_heads) * e;
    normed(c, team, v, c->x, &l->input_norm, m, d, most_of(form_of(&l->q), most_of(form_of(&l->k), form_of(&l->v))));
    product(c, team, v, &l->q, m, c->z, heads, false);
    product(c, team, v, &l->k, m, c->z + model->n_heads * e, heads, false);
    product(c, team, v, &l->v, m, c->z + (model->n_heads + model->n_kv_heads) * e, heads, false);
    bn_wait(team);
    attention(c, team, l, index, v->scratch);
    bn_wait(team);
    normed(c, team, v, c->y, &l->attn_norm, m, d, form_of(&l->o));
    product(c, team, v, &l->o, m, c->x, d, true);
    bn_wait(team);
    normed(c, team, v, c->x, &l->mlp_norm, m, d, most_of(form_of(&l->gate), form_of(&l->up)));
    product(c, team, v, &l->gate, m, c->z, 2 * f, false);
    product(c, team, v, &l->up, m, c->z + f, 2 * f, false);
    bn_wait(team);
    gated(c, team, v, l);
    product(c, team, v, &l->down, m, c->x, d, true);
    bn_wait(team);
}

/* The first index of the largest of x [n]; -1 if that is not finite. It compares integers that have
 * the order of the floats, so that the loop has no branch. */
static int64_t argmax(const float *x, int64_t n) {
    int32_t largest = INT32_MIN, nan = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        nan |= (bits & INT32_MAX) > 0x7f800000;
        bits ^= (bits >> 31) & INT32_MAX;
        largest = bits > largest ? bits : largest;
    }
    largest ^= (largest >> 31) & INT32_MAX;
    if (nan || (largest & 0x7f800000) == 0x7f800000) return -1;
    float value;
    memcpy(&value, &largest, sizeof value);
    for (int64_t i = 0; i < n; i++)
        if (x[i] == value) return i;
    return -1;
}

/* The head: logits, chosen and next tokens of the rows of c->out. */
static void head(const call *c, const bn_team *team, view *v) {
    const bn_model *model = c->model;
    const bn_matrix *w = &model->head;
    int64_t d = model->d_model, begin, end;
    form f = form_of(w);
    tokens_of(team, v, c->n_out, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        c->isa->rows->rmsnorm(c->x + c->out[i] * d, model->norm.weight, model->norm.eps, d, v->y + i * d);
        formed(c, v, i, d, f);
    }
    v->tokens.stride = bn_padded(d);
    if (!v->own) bn_wait(team);
    /* Adjacent rows are written at once. */
    for (int64_t i = 0; i < c->n_out;) {
        int64_t row = c->row[c->out[i]], count = 1;
        while (i + count < c->n_out && c->row[c->out[i + count]] == row + count) count++;
        view part = *v;
        part.y += i * d;
        part.tokens.codes += i * v->tokens.stride;
        part.tokens.bits += i * v->tokens.stride / 8;
        part.tokens.scale += i;
        part.tokens.sum += i;
        product(c, team, &part, w, count, model->logits + row * model->vocab, model->vocab, false);
        i += count;
    }
    bn_wait(team);
    for (int64_t i = team->index; i < c->n_out; i += team->size) {
        int64_t row = c->row[c->out[i]];
        int64_t best = argmax(model->logits + row * model->vocab, model->vocab);
        model->chosen[row] = best;
        model->tokens[row] = best < 0 ? 0 : best;
    }
}

static void run(const bn_team *team, void *argument) {
    const call *c = argument;
    const bn_model *model = c->model;
    int64_t begin, end, d = model->d_model;
    int64_t bytes = model->embedding_kind == BN_MATRIX_F32 ? 4 : 2;
    view v = inputs(c, team);
    bn_share(team, c->m, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        c->isa->rows->widen(
            (const char *)model->embedding + c->token[i] * d * bytes,
            (bn_dtype)model->embedding_kind, d, c->x + i * d
        );
    bn_wait(team);
    for (int64_t index = 0; index < model->n_layers; index++) run_layer(c, team, &v, index);
    head(c, team, &v);
}

/* Cut the tokens into blocks of one row, and run. */
static int64_t forward(call *c, int32_t threads) {
    for (int64_t i = 0; i < c->m; i++)
        if (c->token[i] < 0 || c->token[i] >= c->model->vocab) return i;
    c->n_blocks = 0;
    for (int64_t i = 0; i < c->m; i++) {
        block *b = c->blocks + c->n_blocks - 1;
        if (i > 0 && c->row[i] == c->row[i - 1] && b->count < BLOCK)
            b->count++;
        else
            c->blocks[c->n_blocks++] = (block){i, 1};
    }
    bn_parallel(run, c, threads < c->model->threads ? threads : (int32_t)c->model->threads);
    return -1;
}

int64_t bn_step(const bn_model *model, int64_t batch, int32_t threads) {
    call c = {.model = model, .isa = bn_isa_current(), .m = batch, .n_out = batch, .token = model->tokens};
    lay_out(model, &c);
    for (int64_t i = 0; i < batch; i++) {
        int64_t at = model->lengths[i];
        c.row[i] = c.out[i] = i;
        c.column[i] = at < 0 ? 0 : at > model->max_len ? model->max_len : at;
    }
    int64_t bad = forward(&c, threads);
    if (bad >= 0) return bad;
    for (int64_t i = 0; i < batch; i++) {
        int64_t next = (int64_t)model->lengths[i] + model->active[i];
        model->lengths[i] = (int32_t)(next > model->max_len ? model->max_len : next);
    }
    return -1;
}

int64_t bn_prefill(
    const bn_model *model, const int64_t *tokens, const bn_piece *pieces, int64_t n_pieces,
    int32_t threads
) {
    call c = {.model = model, .isa = bn_isa_current(), .n_out = n_pieces, .token = tokens};
    lay_out(model, &c);
    for (int64_t p = 0; p < n_pieces; p++) {
        for (int64_t i = 0; i < pieces[p].n; i++, c.m++) {
            c.row[c.m] = pieces[p].row;
            c.column[c.m] = pieces[p].start + i;
        }
        c.out[p] = c.m - 1;
    }
    return forward(&c, threads);
}
