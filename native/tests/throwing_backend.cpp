// Devices for tests: "Standin0", "Standin1", ... compute in the host's memory with ggml's CPU backend, but as far as
// ggml knows they are GPUs. A test names a place in which one of them throws. tests/backend/test_throwing.py drives
// them.
#include "backend_abi.h"
#include "metal_table.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

// ggml's backends log through it; no header for others has it.
extern "C" void ggml_log_internal(enum ggml_log_level level, const char * format, ...);

namespace {

constexpr int MAX_DEVICES = 4;

abi::registry    the_registry;
abi::device      devices[MAX_DEVICES];
abi::buffer_type types[MAX_DEVICES];
std::string      names[MAX_DEVICES];
int              n_devices;
ggml_backend_t   cpu;

// where to throw
std::string fault_place, fault_kind;
int         fault_device = -1; // -1: any
int         fault_after;       // calls that go well before
long        n_thrown;

// device -1: what all of them have in common
void may_throw(const char * place, int device) {
    if (fault_place != place || (device != -1 && fault_device != -1 && device != fault_device) || fault_after-- > 0) {
        return;
    }
    n_thrown++;
    if (fault_kind == "memory") throw std::bad_alloc();
    if (fault_kind == "odd") throw 42;
    if (fault_kind == "abort") { // as CUDA does it
        ggml_log_internal(GGML_LOG_LEVEL_ERROR, "Standin error: no luck in %s\n", place);
        ggml_log_internal(GGML_LOG_LEVEL_ERROR, "  in function %s\n", __func__);
        GGML_ABORT("Standin error");
    }
    throw std::runtime_error("Standin: no luck in\n" + std::string(place));
}

// Whether STANDIN_REFUSES has this operation: its names as ggml has them, between commas. STANDIN_METAL: what Metal
// does not know is refused.
bool refused(const ggml_tensor * op) {
    if (std::getenv("STANDIN_METAL") && !metal::supports(op)) {
        return true;
    }
    const char * names = std::getenv("STANDIN_REFUSES");
    const std::string name = "," + std::string(ggml_op_desc(op)) + ",";
    return names && ("," + std::string(names) + ",").find(name) != std::string::npos;
}

int index_of(ggml_backend_dev_t d) { return (int) (reinterpret_cast<abi::device *>(d) - devices); }
int index_of(ggml_backend_buffer_type_t t) { return (int) (reinterpret_cast<abi::buffer_type *>(t) - types); }
int index_of(ggml_backend_buffer_t b) { return index_of(ggml_backend_buffer_get_type(b)); }
int index_of(ggml_backend_t b) { return index_of(ggml_backend_get_device(b)); }

ggml_backend_dev_t device(int i) { return reinterpret_cast<ggml_backend_dev_t>(&devices[i]); }

// ---- buffers ------------------------------------------------------------------------------------------------------

void * memory(ggml_backend_buffer_t b) { return reinterpret_cast<abi::buffer *>(b)->context; }

const abi::buffer_table buffer_functions = {
    [](ggml_backend_buffer_t b) {
        may_throw("free_buffer", index_of(b));
        std::free(memory(b));
    },
    [](ggml_backend_buffer_t b) {
        may_throw("get_base", index_of(b));
        return memory(b);
    },
    [](ggml_backend_buffer_t b, ggml_tensor *) {
        may_throw("init_tensor", index_of(b));
        return GGML_STATUS_SUCCESS;
    },
    [](ggml_backend_buffer_t b, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
        may_throw("memset_tensor", index_of(b));
        std::memset((char *) t->data + offset, value, size);
    },
    [](ggml_backend_buffer_t b, ggml_tensor * t, const void * data, size_t offset, size_t size) {
        may_throw("set_tensor", index_of(b));
        std::memcpy((char *) t->data + offset, data, size);
    },
    [](ggml_backend_buffer_t b, const ggml_tensor * t, void * data, size_t offset, size_t size) {
        may_throw("get_tensor", index_of(b));
        std::memcpy(data, (const char *) t->data + offset, size);
    },
    nullptr,
    nullptr,
    [](ggml_backend_buffer_t b, const ggml_tensor *, ggml_tensor *) {
        may_throw("cpy_tensor", index_of(b));
        return false;
    },
    [](ggml_backend_buffer_t b, uint8_t value) {
        may_throw("clear", index_of(b));
        std::memset(memory(b), value, ggml_backend_buffer_get_size(b));
    },
    [](ggml_backend_buffer_t b) { may_throw("reset", index_of(b)); },
};

const abi::buffer_type_table type_functions = {
    [](ggml_backend_buffer_type_t t) { return names[index_of(t)].c_str(); },
    [](ggml_backend_buffer_type_t t, size_t size) {
        may_throw("alloc_buffer", index_of(t));
        void * data = std::aligned_alloc(64, (size + 63) / 64 * 64);
        return reinterpret_cast<ggml_backend_buffer_t>(new abi::buffer { buffer_functions, t, data, size, 0 });
    },
    [](ggml_backend_buffer_type_t t) {
        may_throw("get_alignment", index_of(t));
        return (size_t) 64;
    },
    [](ggml_backend_buffer_type_t t) {
        may_throw("get_max_size", index_of(t));
        return SIZE_MAX;
    },
    [](ggml_backend_buffer_type_t t, const ggml_tensor * tensor) {
        may_throw("get_alloc_size", index_of(t));
        return ggml_nbytes(tensor);
    },
    [](ggml_backend_buffer_type_t t) {
        may_throw("is_host", index_of(t));
        return false;
    },
};

// ---- computing ----------------------------------------------------------------------------------------------------

const abi::backend_table backend_functions = {
    [](ggml_backend_t b) { return names[index_of(b)].c_str(); },
    [](ggml_backend_t b) {
        may_throw("free", index_of(b));
        delete reinterpret_cast<abi::backend *>(b);
    },
    nullptr, nullptr, nullptr, nullptr, nullptr,
    [](ggml_backend_t b) { may_throw("synchronize", index_of(b)); },
    nullptr, nullptr, nullptr, nullptr,
    [](ggml_backend_t b, ggml_cgraph * graph) {
        may_throw("graph_compute", index_of(b));
        return ggml_backend_graph_compute(cpu, graph);
    },
    nullptr, nullptr,
    [](ggml_backend_t b, ggml_cgraph *, void *) { may_throw("graph_optimize", index_of(b)); },
};

// ---- devices ------------------------------------------------------------------------------------------------------

const abi::device_table device_functions = {
    [](ggml_backend_dev_t d) { may_throw("get_name", index_of(d)); return names[index_of(d)].c_str(); },
    [](ggml_backend_dev_t d) { may_throw("get_description", index_of(d)); return "a device for tests"; },
    [](ggml_backend_dev_t d, size_t * free_bytes, size_t * total_bytes) {
        may_throw("get_memory", index_of(d));
        *free_bytes = *total_bytes = (size_t) 8 << 30;
    },
    [](ggml_backend_dev_t d) { may_throw("get_type", index_of(d)); return GGML_BACKEND_DEVICE_TYPE_GPU; },
    [](ggml_backend_dev_t d, ggml_backend_dev_props * props) {
        may_throw("get_props", index_of(d));
        *props = { names[index_of(d)].c_str(), "", 0, 0, GGML_BACKEND_DEVICE_TYPE_GPU, nullptr, {} };
    },
    [](ggml_backend_dev_t d, const char *) {
        may_throw("init_backend", index_of(d));
        static uint8_t guid[16] = { 's', 't', 'a', 'n', 'd', 'i', 'n' };
        return reinterpret_cast<ggml_backend_t>(new abi::backend { &guid, backend_functions, d, nullptr });
    },
    [](ggml_backend_dev_t d) {
        may_throw("get_buffer_type", index_of(d));
        return reinterpret_cast<ggml_backend_buffer_type_t>(&types[index_of(d)]);
    },
    nullptr, nullptr,
    [](ggml_backend_dev_t d, const ggml_tensor * op) {
        may_throw("supports_op", index_of(d));
        return op->op != GGML_OP_CUSTOM && !refused(op) &&
               ggml_backend_dev_supports_op(ggml_backend_get_device(cpu), op);
    },
    [](ggml_backend_dev_t d, ggml_backend_buffer_type_t t) {
        may_throw("supports_buft", index_of(d));
        return ggml_backend_buft_get_device(t) == d;
    },
    nullptr, nullptr, nullptr, nullptr,
};

const abi::registry_table registry_functions = {
    [](ggml_backend_reg_t) { may_throw("registry_name", -1); return "Standin"; },
    [](ggml_backend_reg_t) { return (size_t) n_devices; },
    [](ggml_backend_reg_t, size_t i) { return device((int) i); },
    [](ggml_backend_reg_t, const char *) -> void * { may_throw("get_proc_address", -1); return nullptr; },
};

void prepare(int n) {
    cpu          = ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr);
    n_devices    = n;
    the_registry = { abi::VERSION, registry_functions, nullptr };
    for (int i = 0; i < n; i++) {
        names[i]   = "Standin" + std::to_string(i);
        devices[i] = { device_functions, reinterpret_cast<ggml_backend_reg_t>(&the_registry), nullptr };
        types[i]   = { type_functions, device(i), nullptr };
    }
}

} // namespace

extern "C" {

// Adds n devices to ggml's list. NULL, or why not.
__attribute__((visibility("default"))) const char * standin_register(int n) {
    if (!abi::fits()) {
        return "ggml's tables have another version than backend_abi.h";
    }
    if (n_devices > 0 || n < 1 || n > MAX_DEVICES) {
        return "once, with 1 to 4 devices";
    }
    prepare(n);
    ggml_backend_register(reinterpret_cast<ggml_backend_reg_t>(&the_registry));
    return nullptr;
}

// ggml's name for this: two devices, or STANDIN_DEVICES, where the environment variable GGML_BACKEND_PATH names this
// library.
__attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    if (!abi::fits() || n_devices > 0) {
        return nullptr;
    }
    const char * n = std::getenv("STANDIN_DEVICES");
    prepare(n ? std::atoi(n) : 2);
    return reinterpret_cast<ggml_backend_reg_t>(&the_registry);
}

// Lets a device (-1: any) throw in a place after some calls that go well. kind: "error", "memory" or "odd". place "":
// nowhere.
__attribute__((visibility("default"))) void standin_throw(const char * place, int device, const char * kind,
                                                          int after) {
    fault_place  = place;
    fault_device = device;
    fault_kind   = kind;
    fault_after  = after;
    n_thrown     = 0;
}

// How often that has happened
__attribute__((visibility("default"))) long standin_thrown(void) {
    return n_thrown;
}

}
