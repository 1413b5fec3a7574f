#include "devices.h"

#include "guard.h"

#include "ggml.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_KNOWN = 256 };

typedef enum device_state {
    DEVICE_UNTRIED,
    DEVICE_WORKS,
    DEVICE_BROKEN, // did not even say what it is
} device_state;

typedef struct device_facts {
    ggml_backend_dev_t         device;
    char                       name[128];
    char                       description[256];
    char                       label[400];
    enum ggml_backend_dev_type type;
    bool                       is_rpc;
    device_state               state;
} device_facts;

// Entries are added and never changed but for their state, nor moved, so that those up to n_known can be read by any
// thread.
static device_facts *  known[MAX_KNOWN];
static atomic_int      n_known;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; // of adding, and of starting devices

const char * mllama_version(void) {
    return MLLAMA_VERSION;
}

const char * mllama_ggml_version_built(void) {
    return MLLAMA_GGML_VERSION;
}

const char * mllama_ggml_version_loaded(void) {
    return ggml_version();
}

// ---- the list -----------------------------------------------------------------------------------------------------

static mllama_status ask_facts(device_facts * f) {
    const char * name = NULL, * description = NULL, * registry = NULL;
    TRY(guard_name(f->device, &name));
    snprintf(f->name, sizeof(f->name), "%s", name);
    snprintf(f->label, sizeof(f->label), "%s", name);
    TRY(guard_type(f->device, &f->type));
    TRY(guard_description(f->device, &description));
    snprintf(f->description, sizeof(f->description), "%s", description);
    TRY(guard_registry_name(f->device, &registry));
    f->is_rpc = strcmp(registry, "RPC") == 0;
    if (f->is_rpc) {
        snprintf(f->label, sizeof(f->label), "%s (worker %s)", f->name, f->description);
    }
    return MLLAMA_OK;
}

static mllama_status add(int32_t index) {
    device_facts * f = calloc(1, sizeof(*f));
    if (!f) {
        return fail(MLLAMA_ERR_MEMORY, "out of memory");
    }
    snprintf(f->name, sizeof(f->name), "device%d", index); // of one that does not tell its own
    snprintf(f->label, sizeof(f->label), "%d", index);
    f->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    mllama_status status = guard_device(index, &f->device);
    if (status == MLLAMA_OK) {
        known[index] = f; // messages of what follows ask for its label
        atomic_store(&n_known, index + 1);
        status = ask_facts(f);
    }
    if (!f->device) {
        free(f);
        return status;
    }
    if (status != MLLAMA_OK) {
        f->state = DEVICE_BROKEN;
        log_warn("%s", mllama_last_error());
    }
    return MLLAMA_OK;
}

static mllama_status notice(void) {
    int32_t n = 0;
    TRY(guard_count_devices(&n));
    n = n < MAX_KNOWN ? n : MAX_KNOWN;
    for (int32_t i = atomic_load(&n_known); i < n; i++) {
        TRY(add(i));
    }
    return devices_cpu() ? MLLAMA_OK : fail(MLLAMA_ERR_BACKEND, "ggml has no CPU backend; reinstall llama-cpp-python");
}

mllama_status devices_init(void) {
    if (strcmp(ggml_version(), MLLAMA_GGML_VERSION) != 0) {
        return fail(MLLAMA_ERR_BACKEND, "compiled for ggml %s, but ggml %s is loaded; reinstall mllama_gguf",
                    MLLAMA_GGML_VERSION, ggml_version());
    }
    log_install();
    pthread_mutex_lock(&mutex);
    ggml_time_init();
    const mllama_status status = notice();
    pthread_mutex_unlock(&mutex);
    return status;
}

int32_t devices_count(void) {
    return atomic_load(&n_known);
}

ggml_backend_dev_t devices_get(int32_t index) {
    return index >= 0 && index < devices_count() ? known[index]->device : NULL;
}

ggml_backend_dev_t devices_cpu(void) {
    for (int32_t i = 0; i < devices_count(); i++) {
        if (device_is_cpu(known[i]->device)) return known[i]->device;
    }
    return NULL;
}

static device_facts * facts_of(ggml_backend_dev_t device) {
    for (int32_t i = 0; i < devices_count(); i++) {
        if (known[i]->device == device) return known[i];
    }
    return NULL;
}

const char * device_name(ggml_backend_dev_t device) {
    const device_facts * f = facts_of(device);
    return f ? f->name : "unknown";
}

const char * device_label(ggml_backend_dev_t device) {
    const device_facts * f = facts_of(device);
    return f ? f->label : "unknown";
}

static bool has_type(ggml_backend_dev_t device, enum ggml_backend_dev_type type) {
    const device_facts * f = facts_of(device);
    return f && f->type == type;
}

bool device_is_cpu(ggml_backend_dev_t device) {
    return has_type(device, GGML_BACKEND_DEVICE_TYPE_CPU);
}

bool device_is_gpu(ggml_backend_dev_t device) {
    return has_type(device, GGML_BACKEND_DEVICE_TYPE_GPU) || has_type(device, GGML_BACKEND_DEVICE_TYPE_IGPU);
}

bool device_is_accel(ggml_backend_dev_t device) {
    return has_type(device, GGML_BACKEND_DEVICE_TYPE_ACCEL);
}

bool device_is_rpc(ggml_backend_dev_t device) {
    const device_facts * f = facts_of(device);
    return f && f->is_rpc;
}

// ---- starting -----------------------------------------------------------------------------------------------------

static mllama_status try_start(device_facts * f) {
    ggml_backend_t             backend = NULL;
    ggml_backend_buffer_type_t type    = NULL;
    size_t                     free_bytes, total_bytes;
    if (f->state == DEVICE_BROKEN) {
        TRY(ask_facts(f));
        f->state = DEVICE_UNTRIED;
    }
    log_forget();
    TRY(guard_start(f->device, &backend));
    if (!backend) {
        return fail(MLLAMA_ERR_BACKEND, "device %s cannot be started%s%s", f->label, log_last_error()[0] ? ": " : "",
                    log_last_error());
    }
    mllama_status status = guard_buffer_type(f->device, &type);
    if (status == MLLAMA_OK) {
        status = guard_memory(f->device, &free_bytes, &total_bytes);
    }
    guard_backend_free(backend);
    return status;
}

mllama_status device_start(ggml_backend_dev_t device) {
    device_facts * f = facts_of(device);
    if (!f) {
        return fail(MLLAMA_ERR_ARGUMENT, "no such device");
    }
    if (f->is_rpc) { // a worker answered when it was added; its loss ends the process, whatever is tried
        return MLLAMA_OK;
    }
    pthread_mutex_lock(&mutex);
    const mllama_status status = f->state == DEVICE_WORKS ? MLLAMA_OK : try_start(f);
    if (status == MLLAMA_OK) {
        f->state = DEVICE_WORKS;
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

// ---- for callers --------------------------------------------------------------------------------------------------

int32_t mllama_device_count(void) {
    return devices_init() == MLLAMA_OK ? devices_count() : 0;
}

static mllama_status find(int32_t index, device_facts ** facts) {
    TRY(devices_init());
    if (!devices_get(index)) {
        return fail(MLLAMA_ERR_ARGUMENT, "no device %d; there are %d", index, devices_count());
    }
    *facts = known[index];
    return MLLAMA_OK;
}

mllama_status mllama_device_get(int32_t index, mllama_device_info * info) {
    device_facts * f = NULL;
    size_t         free_bytes = 0, total_bytes = 0;
    TRY(find(index, &f));
    if (f->state != DEVICE_BROKEN && guard_memory(f->device, &free_bytes, &total_bytes) != MLLAMA_OK) {
        log_warn("%s", mllama_last_error());
    }
    *info = (mllama_device_info) {
        .name = f->name, .description = f->description, .type = (int32_t) f->type,
        .memory_free = free_bytes, .memory_total = total_bytes,
    };
    return MLLAMA_OK;
}

mllama_status mllama_device_start(int32_t index) {
    device_facts * f = NULL;
    TRY(find(index, &f));
    return device_start(f->device);
}
