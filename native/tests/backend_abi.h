// The tables by which ggml calls a backend, as far as a stand-in needs them. ggml does not install its own header of
// them; the order of the entries is version 2 of its backend interface (ggml 0.25), which `fits` checks in the
// loaded library.
#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <cstdint>

namespace abi {

constexpr int VERSION = 2;

using unused = void (*)();

struct buffer_type_table {
    const char *          (* get_name)(ggml_backend_buffer_type_t);
    ggml_backend_buffer_t (* alloc_buffer)(ggml_backend_buffer_type_t, size_t);
    size_t                (* get_alignment)(ggml_backend_buffer_type_t);
    size_t                (* get_max_size)(ggml_backend_buffer_type_t);
    size_t                (* get_alloc_size)(ggml_backend_buffer_type_t, const ggml_tensor *);
    bool                  (* is_host)(ggml_backend_buffer_type_t);
};

struct buffer_type {
    buffer_type_table  table;
    ggml_backend_dev_t device;
    void *             context;
};

struct buffer_table {
    void             (* free_buffer)(ggml_backend_buffer_t);
    void *           (* get_base)(ggml_backend_buffer_t);
    enum ggml_status (* init_tensor)(ggml_backend_buffer_t, ggml_tensor *);
    void             (* memset_tensor)(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t);
    void             (* set_tensor)(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t);
    void             (* get_tensor)(ggml_backend_buffer_t, const ggml_tensor *, void *, size_t, size_t);
    unused           set_tensor_2d, get_tensor_2d;
    bool             (* cpy_tensor)(ggml_backend_buffer_t, const ggml_tensor *, ggml_tensor *);
    void             (* clear)(ggml_backend_buffer_t, uint8_t);
    void             (* reset)(ggml_backend_buffer_t);
};

struct buffer {
    buffer_table               table;
    ggml_backend_buffer_type_t type;
    void *                     context;
    size_t                     size;
    int                        usage;
};

struct backend_table {
    const char *     (* get_name)(ggml_backend_t);
    void             (* free)(ggml_backend_t);
    unused           set_tensor_async, get_tensor_async, set_tensor_2d_async, get_tensor_2d_async, cpy_tensor_async;
    void             (* synchronize)(ggml_backend_t);
    unused           plan_create, plan_free, plan_update, plan_compute;
    enum ggml_status (* graph_compute)(ggml_backend_t, ggml_cgraph *);
    unused           event_record, event_wait;
    void             (* graph_optimize)(ggml_backend_t, ggml_cgraph *, void *);
};

struct backend {
    ggml_guid_t        guid;
    backend_table      table;
    ggml_backend_dev_t device;
    void *             context;
};

struct device_table {
    const char *               (* get_name)(ggml_backend_dev_t);
    const char *               (* get_description)(ggml_backend_dev_t);
    void                       (* get_memory)(ggml_backend_dev_t, size_t *, size_t *);
    enum ggml_backend_dev_type (* get_type)(ggml_backend_dev_t);
    void                       (* get_props)(ggml_backend_dev_t, ggml_backend_dev_props *);
    ggml_backend_t             (* init_backend)(ggml_backend_dev_t, const char *);
    ggml_backend_buffer_type_t (* get_buffer_type)(ggml_backend_dev_t);
    unused                     get_host_buffer_type, buffer_from_host_ptr;
    bool                       (* supports_op)(ggml_backend_dev_t, const ggml_tensor *);
    bool                       (* supports_buft)(ggml_backend_dev_t, ggml_backend_buffer_type_t);
    unused                     offload_op, event_new, event_free, event_synchronize;
};

struct device {
    device_table       table;
    ggml_backend_reg_t registry;
    void *             context;
};

struct registry_table {
    const char *       (* get_name)(ggml_backend_reg_t);
    size_t             (* get_device_count)(ggml_backend_reg_t);
    ggml_backend_dev_t (* get_device)(ggml_backend_reg_t, size_t);
    void *             (* get_proc_address)(ggml_backend_reg_t, const char *);
};

struct registry {
    int            version;
    registry_table table;
    void *         context;
};

// Whether the loaded ggml has these tables: its CPU backend says which version it was built with.
inline bool fits() {
    const ggml_backend_reg_t cpu = ggml_backend_reg_by_name("CPU");
    return cpu && reinterpret_cast<const registry *>(cpu)->version == VERSION;
}

} // namespace abi
