// Hands damaged model files to mllama_model_load, for a number of seconds:
//
//     python tests/layouts.py CORPUS && fuzz_loader CORPUS SECONDS [SEED]
//     fuzz_loader --run TEXT.gguf [MMPROJ.gguf]       once, with these files
//
// One process loads, another watches. What the first dies of, or hangs in, is left in crash-SEED-NUMBER/, the exit
// status is 1, and the last line names the command that loads it again. Files that reach code which none reached
// before are mutated further. The same seed gives the same inputs; how many, the time says.
#define _GNU_SOURCE
#include "gguf_mutate.h"
#include "mllama.h"

#include "file/hparams.h"
#include "model/weights.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_MODELS   = 32,
    MAX_FILES    = 16,
    MAX_VARIANTS = 256,
    MAX_VARIANT  = 256 << 10, // bytes
    N_CTX        = 32,
    LEAKS_EVERY  = 20000, // inputs
    HANG         = 30,    // seconds
};

typedef struct model_file {
    char  name[256];
    bytes variants[MAX_VARIANTS]; // the first is the sound file
    int   n_variants;
} model_file;

typedef struct model {
    char       dir[512];
    bool       has_mmproj; // then the second file, else the other files are parts of split ones
    model_file files[MAX_FILES];
    int        n_files;
} model;

// Seen by both processes.
static struct progress {
    uint64_t inputs;
    uint64_t header;  // keys and tables of all files read
    uint64_t keys;    // the keys are right, tensors are looked for
    uint64_t tensors; // every tensor is right
    uint64_t loaded;
    uint64_t computed;
    uint64_t edges;   // of the control flow of libmllama, seen
    uint64_t variants;
    int      model;   // that is being loaded
} * progress;

static model models[MAX_MODELS];
static int   n_models;

static void die(const char * what, const char * name) {
    fprintf(stderr, "fuzz_loader: %s: %s: %s\n", name, what, strerror(errno));
    exit(2);
}

// ---- how far an input gets ----------------------------------------------------------------------------------------

mllama_status __real_hparams_read_text(const gguf_file * file, hparams * hp);
mllama_status __wrap_hparams_read_text(const gguf_file * file, hparams * hp);
mllama_status __wrap_hparams_read_text(const gguf_file * file, hparams * hp) {
    progress->header++;
    return __real_hparams_read_text(file, hp);
}

mllama_status __real_weights_find(mllama_model * model, bool allow_quantized_vision);
mllama_status __wrap_weights_find(mllama_model * model, bool allow_quantized_vision);
mllama_status __wrap_weights_find(mllama_model * model, bool allow_quantized_vision) {
    progress->keys++;
    return __real_weights_find(model, allow_quantized_vision);
}

static uint8_t   seen[1 << 16];
static uintptr_t previous;
static bool      reached_new;

// Called by every basic block of libmllama (-fsanitize-coverage=trace-pc).
void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void) {
    const uintptr_t block = (uintptr_t) __builtin_return_address(0) - (uintptr_t) &__sanitizer_cov_trace_pc;
    const uintptr_t edge  = (block ^ previous) % sizeof(seen);
    previous = block >> 1;
    if (!seen[edge]) {
        seen[edge]  = 1;
        reached_new = true;
        if (progress) {
            progress->edges++;
        }
    }
}

// ---- one input ----------------------------------------------------------------------------------------------------

static void silence(int32_t level, const char * text, void * user_data) {
    (void) level, (void) text, (void) user_data;
}

// The model passed every check, so whatever it computes must be safe.
static void compute(const mllama_model * m) {
    const mllama_hparams * p  = mllama_model_hparams(m);
    mllama_context_params  cp = mllama_context_default_params();
    mllama_context *       ctx;
    cp.n_ctx = N_CTX, cp.n_batch = 8, cp.n_threads = 1;
    if (mllama_context_new(m, &cp, &ctx) != MLLAMA_OK) {
        return;
    }
    const size_t n_pixels = 3 * (size_t) p->image_size * (size_t) p->image_size,
                 n_states = (size_t) p->n_positions * (size_t) p->n_embd;
    float *      pixels = calloc(n_pixels + 1, sizeof(float)), * states = calloc(n_states + 1, sizeof(float));
    float *      logits = calloc((size_t) p->vocab_size, sizeof(float));
    int32_t      tokens[] = { 0, p->image_token_id, p->vocab_size - 1 }, slot = -1, n_tiles = 1;
    if (pixels && states && logits &&
        mllama_decode(ctx, tokens, 1, -1, 0, MLLAMA_LOGITS_LAST, logits, p->vocab_size) == MLLAMA_OK) {
        progress->computed++;
        if (p->n_positions > 0 && mllama_encode(ctx, pixels, 1, 1, states) == MLLAMA_OK &&
            mllama_image_fill(ctx, 1, (const float * const[]) { states }, &n_tiles, &slot) == MLLAMA_OK) {
            mllama_decode(ctx, tokens, 3, slot, 1, MLLAMA_LOGITS_LAST, logits, p->vocab_size);
        }
    }
    free(pixels);
    free(states);
    free(logits);
    mllama_context_free(ctx);
}

static mllama_status load(const char * text, const char * mmproj, bool use_mmap, bool allow_quantized, bool computes) {
    mllama_model_params params = mllama_model_default_params();
    mllama_model *      m      = NULL;
    params.use_mmap               = use_mmap;
    params.allow_quantized_vision = allow_quantized;
    params.check_only             = true;
    mllama_status status = mllama_model_load(text, mmproj, &params, &m);
    if (status != MLLAMA_OK) {
        return status;
    }
    progress->tensors++;
    mllama_tensor_info info;
    for (int32_t i = 0; i < mllama_model_n_tensors(m); i++) {
        mllama_model_tensor(m, i, &info);
    }
    for (int32_t i = 0; mllama_model_repair(m, i); i++) {
    }
    mllama_model_free(m);
    params.check_only = false;
    status = mllama_model_load(text, mmproj, &params, &m);
    if (status == MLLAMA_OK) {
        progress->loaded++;
        if (computes) {
            compute(m);
        }
        mllama_model_free(m);
    }
    return status;
}

static void path_of(const model * m, int file, char * path, size_t n) {
    snprintf(path, n, "%s/%s", m->dir, m->files[file].name);
}

static mllama_status load_model(const model * m, bool use_mmap, bool allow_quantized, bool computes) {
    char text[1024], mmproj[1024];
    path_of(m, 0, text, sizeof(text));
    path_of(m, 1, mmproj, sizeof(mmproj));
    return load(text, m->has_mmproj ? mmproj : NULL, use_mmap, allow_quantized, computes);
}

// ---- files --------------------------------------------------------------------------------------------------------

static void write_file(const model * m, int file, bytes data) {
    char path[1024];
    path_of(m, file, path, sizeof(path));
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0 || write(fd, data.data, data.n) != (ssize_t) data.n || close(fd) != 0) {
        die("cannot write", path);
    }
}

static bytes read_file(const char * path) {
    FILE *      f = fopen(path, "rb");
    struct stat st;
    if (!f || fstat(fileno(f), &st) != 0) {
        die("cannot read", path);
    }
    bytes data = { malloc((size_t) st.st_size), (size_t) st.st_size };
    if (!data.data || fread(data.data, 1, data.n, f) != data.n) {
        die("cannot read", path);
    }
    fclose(f);
    return data;
}

// CORPUS/models: a line for each model, its text file, its projector or "-", and the other files.
static void read_corpus(const char * corpus, const char * work) {
    char path[1024], line[4096];
    snprintf(path, sizeof(path), "%s/models", corpus);
    FILE * list = fopen(path, "r");
    if (!list) {
        die("cannot read", path);
    }
    while (n_models < MAX_MODELS && fgets(line, sizeof(line), list)) {
        model * m = &models[n_models];
        snprintf(m->dir, sizeof(m->dir), "%s/%d", work, n_models++);
        if (mkdir(m->dir, 0755) != 0) {
            die("cannot make", m->dir);
        }
        int number = 0;
        for (char * word = strtok(line, " \n"); word && m->n_files < MAX_FILES; word = strtok(NULL, " \n"), number++) {
            if (number == 1) {
                m->has_mmproj = strcmp(word, "-") != 0;
            }
            if (strcmp(word, "-") != 0) {
                model_file * file  = &m->files[m->n_files];
                const char * slash = strrchr(word, '/');
                snprintf(file->name, sizeof(file->name), "%s", slash ? slash + 1 : word);
                snprintf(path, sizeof(path), "%s/%s", corpus, word);
                file->variants[file->n_variants++] = read_file(path);
                dictionary_learn(file->variants[0]);
                write_file(m, m->n_files++, file->variants[0]);
            }
        }
    }
    fclose(list);
}

static void remove_work(const char * work) {
    char path[1024];
    for (int i = 0; i < n_models; i++) {
        for (int f = 0; f < models[i].n_files; f++) {
            path_of(&models[i], f, path, sizeof(path));
            unlink(path);
        }
        rmdir(models[i].dir);
    }
    rmdir(work);
}

// ---- the process that loads ---------------------------------------------------------------------------------------

int          __lsan_do_recoverable_leak_check(void);
const char * __asan_default_options(void);
const char * __asan_default_options(void) {
    return "allocator_may_return_null=1:hard_rss_limit_mb=3072:detect_leaks=1";
}

static void mutate_and_load(void) {
    progress->model = (int) random_below((uint64_t) n_models);
    model *      m    = &models[progress->model];
    const int    f    = (int) random_below((uint64_t) m->n_files);
    model_file * file = &m->files[f];
    arena_reset();
    const bytes data = mutate(file->variants[random_below(2) ? 0 : random_below((uint64_t) file->n_variants)]);
    if (!data.data) {
        return;
    }
    write_file(m, f, data);
    reached_new = false;
    previous    = 0;
    load_model(m, random_below(4) != 0, random_below(2), random_below(4) == 0);
    progress->inputs++;
    if (reached_new && file->n_variants < MAX_VARIANTS && data.n <= MAX_VARIANT) {
        const bytes kept = { malloc(data.n), data.n };
        if (kept.data) {
            memcpy(kept.data, data.data, data.n);
            file->variants[file->n_variants++] = kept;
            progress->variants++;
        }
    }
    write_file(m, f, file->variants[0]);
}

static void work_until(time_t end, uint64_t seed) {
    random_seed(seed);
    for (int i = 0; i < n_models; i++) {
        progress->model = i;
        if (load_model(&models[i], true, false, true) != MLLAMA_OK) {
            fprintf(stderr, "fuzz_loader: a sound model of the corpus does not load: %s\n", mllama_last_error());
            _exit(2);
        }
    }
    *progress = (struct progress) { .edges = progress->edges };
    while (time(NULL) < end) {
        mutate_and_load();
        if (progress->inputs % LEAKS_EVERY == 0 && __lsan_do_recoverable_leak_check()) {
            fprintf(stderr, "fuzz_loader: memory leaks in one of the last %d inputs\n", LEAKS_EVERY);
            _exit(1);
        }
    }
    _exit(__lsan_do_recoverable_leak_check() ? 1 : 0);
}

// ---- the process that watches -------------------------------------------------------------------------------------

static void report(const char * when, time_t seconds) {
    const struct progress p = *progress;
    printf("%s %lld s: %llu inputs; header and tables read %llu, keys right %llu, tensors right %llu, loaded %llu, "
           "computed %llu; "
           "%llu edges, %llu inputs kept\n",
           when, (long long) seconds, (unsigned long long) p.inputs, (unsigned long long) p.header,
           (unsigned long long) p.keys, (unsigned long long) p.tensors, (unsigned long long) p.loaded,
           (unsigned long long) p.computed, (unsigned long long) p.edges, (unsigned long long) p.variants);
    fflush(stdout);
}

static void keep_input(uint64_t seed) {
    const model * m = &models[progress->model];
    char          dir[128], from[1024], to[1024], text[512] = "", mmproj[512] = "";
    snprintf(dir, sizeof(dir), "crash-%llu-%llu", (unsigned long long) seed, (unsigned long long) progress->inputs);
    if (mkdir(dir, 0755) != 0 && errno != EEXIST) {
        die("cannot make", dir);
    }
    for (int f = 0; f < m->n_files; f++) {
        path_of(m, f, from, sizeof(from));
        snprintf(to, sizeof(to), "%s/%s", dir, m->files[f].name);
        const bytes data = read_file(from);
        FILE *      out  = fopen(to, "wb");
        if (!out || fwrite(data.data, 1, data.n, out) != data.n || fclose(out) != 0) {
            die("cannot write", to);
        }
        free(data.data);
    }
    snprintf(text, sizeof(text), "%s/%.255s", dir, m->files[0].name);
    if (m->has_mmproj) {
        snprintf(mmproj, sizeof(mmproj), " %s/%.255s", dir, m->files[1].name);
    }
    printf("input kept: fuzz_loader --run %s%s\n", text, mmproj);
}

// 0 when the loading process ends well, and its inputs got everywhere.
static int watch(pid_t child, time_t start, uint64_t seed) {
    uint64_t last  = 0;
    time_t   moved = time(NULL), reported = start;
    for (;;) {
        int         status;
        const pid_t ended = waitpid(child, &status, WNOHANG);
        const time_t now  = time(NULL);
        if (ended == child) {
            report("after", now - start);
            if (WIFEXITED(status) && WEXITSTATUS(status) == 2) {
                return 2;
            }
            if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
                if (!progress->loaded || progress->header == progress->inputs) {
                    printf("NO REACH: none of the inputs was damaged, or none was sound enough to load\n");
                    return 1;
                }
                return 0;
            }
            printf("CRASH: %s %d\n", WIFEXITED(status) ? "exit status" : "signal",
                   WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
            keep_input(seed);
            return 1;
        }
        if (progress->inputs != last) {
            last  = progress->inputs;
            moved = now;
        } else if (now - moved > HANG) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            report("after", now - start);
            printf("HANG: an input took more than %d s\n", HANG);
            keep_input(seed);
            return 1;
        }
        if (now - reported >= 60) {
            report("at", now - start);
            reported = now;
        }
        usleep(100000);
    }
}

int main(int argc, char ** argv) {
    setenv("GGML_NO_BACKTRACE", "1", 1); // else a failed assertion waits for a debugger
    mllama_log_set(silence, NULL);
    progress = mmap(NULL, sizeof(*progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (progress == MAP_FAILED) {
        die("no memory", argv[0]);
    }
    if (argc >= 3 && strcmp(argv[1], "--run") == 0) {
        for (int i = 0; i < 4; i++) {
            const mllama_status status = load(argv[2], argc > 3 ? argv[3] : NULL, i & 1, i & 2, true);
            printf("%s\n", status == MLLAMA_OK ? "loads" : mllama_last_error());
        }
        return 0;
    }
    const time_t   seconds = argc >= 3 ? strtol(argv[2], NULL, 10) : 0;
    const uint64_t seed    = argc >= 4 ? strtoull(argv[3], NULL, 10) : 1;
    if (seconds <= 0) {
        fprintf(stderr, "usage: fuzz_loader CORPUS SECONDS [SEED], or fuzz_loader --run TEXT [MMPROJ]\n");
        return 2;
    }
    char work[] = "/dev/shm/fuzz_loader.XXXXXX", other[] = "/tmp/fuzz_loader.XXXXXX", * dir = mkdtemp(work);
    if (!dir && !(dir = mkdtemp(other))) {
        die("cannot make", other);
    }
    read_corpus(argv[1], dir);
    const time_t start = time(NULL);
    const pid_t  child = fork();
    if (child < 0) {
        die("no process", argv[0]);
    }
    if (child == 0) {
        work_until(start + seconds, seed);
    }
    const int result = watch(child, start, seed);
    remove_work(dir);
    return result;
}
