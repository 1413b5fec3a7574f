#include "gguf_mutate.h"

#include "ggml.h"
#include "gguf.h"

#include <stdbool.h>
#include <string.h>

enum {
    MAX_KEYS    = 256,
    MAX_TENSORS = 512,
    MAX_WORDS   = 4096,
    MAX_DATA    = 1 << 20, // a file that claims more data is written without it
    ARENA       = 32 << 20,
};

// ---- random numbers, memory, words --------------------------------------------------------------------------------

static uint64_t state;

void random_seed(uint64_t seed) {
    state = seed;
}

uint64_t random_next(void) { // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t random_below(uint64_t n) {
    return n == 0 ? 0 : random_next() % n;
}

static bool one_in(uint64_t n) {
    return random_below(n) == 0;
}

static uint8_t arena[ARENA];
static size_t  arena_used;

void arena_reset(void) {
    arena_used = 0;
}

// Never more than inputs of bounded size need.
static uint8_t * allocate(size_t n) {
    n = (n + 15) & ~(size_t) 15;
    if (n > ARENA - arena_used) {
        return NULL;
    }
    uint8_t * p = arena + arena_used;
    arena_used += n;
    return p;
}

static bytes copy_of(const void * data, size_t n) {
    bytes b = { allocate(n), n };
    if (!b.data) {
        return (bytes) { NULL, 0 };
    }
    if (n) {
        memcpy(b.data, data, n);
    }
    return b;
}

static bytes words[MAX_WORDS];
static int   n_words;

void dictionary_add(const char * word, size_t n) {
    if (n_words < MAX_WORDS) {
        words[n_words++] = (bytes) { (uint8_t *) word, n };
    }
}

// ---- a file in parts ----------------------------------------------------------------------------------------------

typedef struct key {
    bytes    name;
    uint32_t type;
    bytes    value; // as it is in the file, after the type
} key;

typedef struct tensor {
    bytes    name;
    uint32_t n_dims;
    uint64_t ne[8];
    uint32_t type;
    uint64_t offset;
    bytes    data;
} tensor;

typedef struct gguf_parts {
    uint32_t version;
    key      keys[MAX_KEYS];
    int      n_keys;
    tensor   tensors[MAX_TENSORS];
    int      n_tensors;
} gguf_parts;

typedef struct cursor {
    bytes  file;
    size_t at;
    bool   ok;
} cursor;

static bytes take(cursor * c, uint64_t n) {
    if (!c->ok || n > c->file.n - c->at) {
        c->ok = false;
        return (bytes) { NULL, 0 };
    }
    const bytes b = { c->file.data + c->at, (size_t) n };
    c->at += (size_t) n;
    return b;
}

static uint64_t take_number(cursor * c, size_t n) {
    uint64_t    value = 0;
    const bytes b     = take(c, n);
    if (b.data) {
        memcpy(&value, b.data, n); // little-endian, as the machines that this runs on
    }
    return value;
}

static bytes take_string(cursor * c) {
    return take(c, take_number(c, 8));
}

static size_t size_of_type(uint64_t type) {
    static const uint8_t sizes[GGUF_TYPE_COUNT] = {
        [GGUF_TYPE_UINT8] = 1,  [GGUF_TYPE_INT8] = 1,  [GGUF_TYPE_UINT16] = 2,  [GGUF_TYPE_INT16] = 2,
        [GGUF_TYPE_UINT32] = 4, [GGUF_TYPE_INT32] = 4, [GGUF_TYPE_FLOAT32] = 4, [GGUF_TYPE_BOOL] = 1,
        [GGUF_TYPE_UINT64] = 8, [GGUF_TYPE_INT64] = 8, [GGUF_TYPE_FLOAT64] = 8,
    };
    return type < GGUF_TYPE_COUNT ? sizes[type] : 0;
}

static bytes take_value(cursor * c, uint32_t type) {
    const size_t start = c->at;
    if (type == GGUF_TYPE_STRING) {
        take_string(c);
    } else if (type == GGUF_TYPE_ARRAY) {
        const uint64_t item = take_number(c, 4), n = take_number(c, 8);
        if (item == GGUF_TYPE_STRING) {
            for (uint64_t i = 0; i < n && c->ok; i++) {
                take_string(c);
            }
        } else if (size_of_type(item) && n <= c->file.n) {
            take(c, n * size_of_type(item));
        } else {
            c->ok = false;
        }
    } else if (size_of_type(type)) {
        take(c, size_of_type(type));
    } else {
        c->ok = false;
    }
    return (bytes) { c->file.data + start, c->at - start };
}

static uint64_t alignment_of(const gguf_parts * p) {
    uint32_t alignment = 32;
    for (int i = 0; i < p->n_keys; i++) {
        const key * k = &p->keys[i];
        if (k->name.n == 17 && memcmp(k->name.data, "general.alignment", 17) == 0 && k->value.n == 4) {
            memcpy(&alignment, k->value.data, 4);
        }
    }
    return alignment && alignment <= 4096 && (alignment & (alignment - 1)) == 0 ? alignment : 32;
}

// Bytes of the data, 0 for what has no size.
static uint64_t data_size(const tensor * t) {
    if (t->type >= GGML_TYPE_COUNT || ggml_blck_size((enum ggml_type) t->type) == 0) {
        return 0;
    }
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dims && i < 8; i++) {
        if (t->ne[i] > MAX_DATA || (n *= t->ne[i]) > MAX_DATA) {
            return 0;
        }
    }
    return n / (uint64_t) ggml_blck_size((enum ggml_type) t->type) * ggml_type_size((enum ggml_type) t->type);
}

static bool take_apart(bytes file, gguf_parts * p) {
    cursor c = { .file = file, .ok = true };
    take(&c, 4);
    p->version               = (uint32_t) take_number(&c, 4);
    const uint64_t n_tensors = take_number(&c, 8), n_keys = take_number(&c, 8);
    if (!c.ok || n_tensors > MAX_TENSORS || n_keys > MAX_KEYS) {
        return false;
    }
    p->n_keys = p->n_tensors = 0;
    for (uint64_t i = 0; i < n_keys && c.ok; i++) {
        key * k  = &p->keys[p->n_keys++];
        k->name  = take_string(&c);
        k->type  = (uint32_t) take_number(&c, 4);
        k->value = take_value(&c, k->type);
    }
    for (uint64_t i = 0; i < n_tensors && c.ok; i++) {
        tensor * t = &p->tensors[p->n_tensors++];
        t->name   = take_string(&c);
        t->n_dims = (uint32_t) take_number(&c, 4);
        if (t->n_dims > 8) {
            return false;
        }
        for (uint32_t d = 0; d < t->n_dims; d++) {
            t->ne[d] = take_number(&c, 8);
        }
        t->type   = (uint32_t) take_number(&c, 4);
        t->offset = take_number(&c, 8);
    }
    if (!c.ok) {
        return false;
    }
    const uint64_t alignment = alignment_of(p), start = (c.at + alignment - 1) / alignment * alignment;
    for (int i = 0; i < p->n_tensors; i++) {
        tensor *       t = &p->tensors[i];
        const uint64_t n = data_size(t);
        if (start <= file.n && t->offset <= file.n - start && n <= file.n - start - t->offset) {
            t->data = (bytes) { file.data + start + t->offset, (size_t) n };
        } else {
            t->data = (bytes) { NULL, 0 };
        }
    }
    return true;
}

void dictionary_learn(bytes file) {
    static gguf_parts p;
    if (take_apart(file, &p)) {
        for (int i = 0; i < p.n_keys; i++) {
            dictionary_add((const char *) p.keys[i].name.data, p.keys[i].name.n);
        }
        for (int i = 0; i < p.n_tensors; i++) {
            dictionary_add((const char *) p.tensors[i].name.data, p.tensors[i].name.n);
        }
    }
}

// ---- putting together ---------------------------------------------------------------------------------------------

typedef struct writer {
    uint8_t * out;  // NULL: only count
    size_t    at;
} writer;

static void put(writer * w, const void * data, size_t n) {
    if (w->out && n) {
        memcpy(w->out + w->at, data, n);
    }
    w->at += n;
}

static void put_number(writer * w, uint64_t value, size_t n) {
    put(w, &value, n);
}

static void put_string(writer * w, bytes b) {
    put_number(w, b.n, 8);
    put(w, b.data, b.n);
}

static void put_zeros(writer * w, size_t n) {
    if (w->out) {
        memset(w->out + w->at, 0, n);
    }
    w->at += n;
}

static void put_file(writer * w, const gguf_parts * p) {
    put(w, "GGUF", 4);
    put_number(w, p->version, 4);
    put_number(w, (uint64_t) p->n_tensors, 8);
    put_number(w, (uint64_t) p->n_keys, 8);
    for (int i = 0; i < p->n_keys; i++) {
        put_string(w, p->keys[i].name);
        put_number(w, p->keys[i].type, 4);
        put(w, p->keys[i].value.data, p->keys[i].value.n);
    }
    for (int i = 0; i < p->n_tensors; i++) {
        const tensor * t = &p->tensors[i];
        put_string(w, t->name);
        put_number(w, t->n_dims, 4);
        for (uint32_t d = 0; d < t->n_dims && d < 8; d++) {
            put_number(w, t->ne[d], 8);
        }
        put_number(w, t->type, 4);
        put_number(w, t->offset, 8);
    }
    const size_t alignment = (size_t) alignment_of(p);
    for (int i = 0; i < p->n_tensors; i++) {
        const tensor * t = &p->tensors[i];
        const size_t   n = (size_t) data_size(t), have = t->data.n < n ? t->data.n : n;
        put_zeros(w, (alignment - w->at % alignment) % alignment);
        put(w, t->data.data, have);
        put_zeros(w, n - have);
    }
    put_zeros(w, (alignment - w->at % alignment) % alignment);
}

// The offsets as readers want them: one tensor after the other.
static void fix_offsets(gguf_parts * p) {
    const uint64_t alignment = alignment_of(p);
    uint64_t       at        = 0;
    for (int i = 0; i < p->n_tensors; i++) {
        p->tensors[i].offset = at;
        at += (data_size(&p->tensors[i]) + alignment - 1) / alignment * alignment;
    }
}

static bytes put_together(const gguf_parts * p) {
    writer w = { NULL, 0 };
    put_file(&w, p);
    const bytes file = { allocate(w.at), w.at };
    if (!file.data) {
        return (bytes) { NULL, 0 };
    }
    w = (writer) { file.data, 0 };
    put_file(&w, p);
    return file;
}

// ---- changes ------------------------------------------------------------------------------------------------------

static uint64_t odd_number(uint64_t value) {
    static const uint64_t odd[] = {
        0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256, 1023, 4096, 4097, 65535, 65536, 1u << 20, 1u << 24,
        0x7fffffff, 0x80000000u, 0xffffffffu, 1ull << 32, 1ull << 40, 1ull << 61, 1ull << 62, INT64_MAX, 1ull << 63,
        UINT64_MAX - 31, UINT64_MAX,
    };
    switch (random_below(5)) {
        case 0:  return value + 1 + random_below(4);
        case 1:  return value - 1 - random_below(4);
        case 2:  return value ^ 1ull << random_below(64);
        case 3:  return random_below(2) ? value * 2 : value / 2;
        default: return odd[random_below(sizeof(odd) / sizeof(odd[0]))];
    }
}

static void change_number(void * data, size_t n) {
    uint64_t value = 0;
    memcpy(&value, data, n);
    value = odd_number(value);
    memcpy(data, &value, n);
}

static void change_bytes(bytes b) {
    for (uint64_t i = random_below(4) + 1; i > 0 && b.n; i--) {
        b.data[random_below(b.n)] = (uint8_t) random_next();
    }
}

static bytes new_name(bytes old) {
    bytes name = n_words && !one_in(3) ? words[random_below((uint64_t) n_words)] : old;
    name = copy_of(name.data, name.n);
    if (name.data && one_in(3)) {
        change_bytes(name);
    }
    if (name.data && one_in(8)) {
        name.n = random_below(name.n + 1);
    }
    return name;
}

static void retype(key * k) {
    static const uint8_t types[] = { GGUF_TYPE_UINT8, GGUF_TYPE_INT32, GGUF_TYPE_FLOAT32, GGUF_TYPE_BOOL,
                                     GGUF_TYPE_STRING, GGUF_TYPE_ARRAY, GGUF_TYPE_UINT64, GGUF_TYPE_FLOAT64, 13, 255 };
    k->type  = types[random_below(sizeof(types))];
    uint8_t * value = allocate(64);
    if (!value) {
        return;
    }
    memset(value, 0, 64);
    size_t n = size_of_type(k->type);
    if (k->type == GGUF_TYPE_STRING) {
        value[0] = (uint8_t) random_below(9);
        n        = 8 + value[0];
    } else if (k->type == GGUF_TYPE_ARRAY) {
        value[0] = (uint8_t) random_below(14);
        value[4] = (uint8_t) random_below(5);
        n        = 12 + value[4] * size_of_type(value[0]);
    } else {
        change_number(value, n);
    }
    k->value = (bytes) { value, n };
}

static void change_key(gguf_parts * p) {
    if (p->n_keys == 0) {
        return;
    }
    const int i = (int) random_below((uint64_t) p->n_keys), j = (int) random_below((uint64_t) p->n_keys);
    key *     k = &p->keys[i];
    switch (random_below(9)) {
        case 0: // gone
            memmove(k, k + 1, (size_t) (p->n_keys - i - 1) * sizeof(*k));
            p->n_keys--;
            break;
        case 1: // one more
            if (p->n_keys < MAX_KEYS) {
                p->keys[p->n_keys] = *k;
                p->keys[p->n_keys++].name = new_name(k->name);
            }
            break;
        case 2: k->name = new_name(k->name); break;
        case 3: k->value = p->keys[j].value; k->type = p->keys[j].type; break;
        case 4: retype(k); break;
        default: {
            k->value = copy_of(k->value.data, k->value.n);
            if (!k->value.data) {
                break;
            }
            if (k->type == GGUF_TYPE_ARRAY) {
                const uint64_t what = random_below(4);
                if (what == 0) {
                    change_number(k->value.data + 4, 8); // the length alone
                } else if (what == 1) {
                    change_number(k->value.data, 4); // the type alone
                } else if (k->value.n > 12) {
                    const size_t item = size_of_type(k->value.data[0]);
                    if (item) {
                        change_number(k->value.data + 12 + random_below((k->value.n - 12) / item) * item, item);
                    } else {
                        change_bytes((bytes) { k->value.data + 12, k->value.n - 12 });
                    }
                }
            } else if (k->type == GGUF_TYPE_STRING) {
                if (one_in(4)) {
                    change_number(k->value.data, 8);
                } else {
                    change_bytes((bytes) { k->value.data + 8, k->value.n - 8 });
                }
            } else {
                change_number(k->value.data, k->value.n);
            }
        }
    }
}

static void change_tensor(gguf_parts * p) {
    if (p->n_tensors == 0) {
        return;
    }
    const int i = (int) random_below((uint64_t) p->n_tensors), j = (int) random_below((uint64_t) p->n_tensors);
    tensor *  t = &p->tensors[i], * other = &p->tensors[j];
    switch (random_below(10)) {
        case 0: // gone
            memmove(t, t + 1, (size_t) (p->n_tensors - i - 1) * sizeof(*t));
            p->n_tensors--;
            break;
        case 1: // one more
            if (p->n_tensors < MAX_TENSORS) {
                p->tensors[p->n_tensors]        = *t;
                p->tensors[p->n_tensors++].name = new_name(t->name);
            }
            break;
        case 2: t->name = new_name(t->name); break;
        case 3: { // names exchanged
            const bytes name = t->name;
            t->name = other->name, other->name = name;
            break;
        }
        case 4: memcpy(t->ne, other->ne, sizeof(t->ne)); t->n_dims = other->n_dims; break;
        case 5: t->type = (uint32_t) (one_in(8) ? odd_number(t->type) : random_below(GGML_TYPE_COUNT + 2)); break;
        case 6: t->n_dims = (uint32_t) random_below(one_in(8) ? 9 : 5); break;
        case 7:
            t->data = copy_of(t->data.data, t->data.n);
            if (t->data.data && t->data.n >= 4 && one_in(2)) {
                const uint32_t special[] = { 0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 1, 0 };
                memcpy(t->data.data + random_below(t->data.n / 4) * 4, &special[random_below(6)], 4);
            } else if (t->data.data) {
                change_bytes(t->data);
            }
            break;
        default:
            if (t->n_dims) {
                uint64_t * ne = &t->ne[random_below(t->n_dims)];
                *ne = odd_number(*ne);
            }
    }
}

static bytes change_raw(bytes file) {
    file = copy_of(file.data, file.n);
    if (!file.data || file.n == 0) {
        return file;
    }
    const size_t head = file.n < 4096 || one_in(2) ? file.n : 4096;
    switch (random_below(4)) {
        case 0: file.n = random_below(file.n + 1); break;
        case 1: { // one piece over another
            const size_t n = random_below(64) + 1;
            if (head > n) {
                memmove(file.data + random_below(head - n), file.data + random_below(head - n), n);
            }
            break;
        }
        case 2: {
            const size_t n = 1u << random_below(4);
            if (head > n) {
                change_number(file.data + random_below(head - n), n);
            }
            break;
        }
        default: change_bytes((bytes) { file.data, head });
    }
    return file;
}

bytes mutate(bytes file) {
    static gguf_parts p;
    if (one_in(8) || !take_apart(file, &p)) {
        return change_raw(file);
    }
    for (uint64_t n = one_in(3) ? random_below(5) + 1 : 1; n > 0; n--) {
        if (one_in(2)) {
            change_key(&p);
        } else {
            change_tensor(&p);
        }
    }
    if (one_in(32)) {
        p.version = (uint32_t) odd_number(p.version);
    }
    fix_offsets(&p);
    if (one_in(16) && p.n_tensors) {
        uint64_t * offset = &p.tensors[random_below((uint64_t) p.n_tensors)].offset;
        *offset = odd_number(*offset);
    }
    bytes changed = put_together(&p);
    return changed.data && one_in(16) ? change_raw(changed) : changed;
}
