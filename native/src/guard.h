// Calls into ggml's backends, some of which throw C++ exceptions: a driver that refuses a device, a device that is
// lost, memory that is not there. No exception may enter C, so every call that a backend answers goes through here.
//
// An exception becomes MLLAMA_ERR_MEMORY or MLLAMA_ERR_BACKEND, and one line for mllama_last_error() that names the
// device. What ggml reports without an exception (NULL, false) is the caller's to judge: the status is then MLLAMA_OK.
#pragma once

#include "status.h"

#include "ggml-backend.h"
#include "gguf.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- devices ------------------------------------------------------------------------------------------------------

// Counts ggml's devices; the first call registers them, or loads the libraries that bring them.
mllama_status guard_count_devices(int32_t * n);
mllama_status guard_device(int32_t index, ggml_backend_dev_t * device);
mllama_status guard_name(ggml_backend_dev_t device, const char ** name);
mllama_status guard_description(ggml_backend_dev_t device, const char ** description);
mllama_status guard_type(ggml_backend_dev_t device, enum ggml_backend_dev_type * type);
mllama_status guard_registry_name(ggml_backend_dev_t device, const char ** name);
mllama_status guard_memory(ggml_backend_dev_t device, size_t * free_bytes, size_t * total_bytes);
mllama_status guard_start(ggml_backend_dev_t device, ggml_backend_t * backend);
mllama_status guard_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t * type);
// *type: memory of the CPU that the device reads and writes fast, or NULL
mllama_status guard_host_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t * type);
mllama_status guard_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op, bool * ok);
const char *  guard_layout_name(ggml_backend_buffer_type_t type); // "" if that cannot be told
// A function that the device's backend has beyond the common ones, or NULL.
mllama_status guard_function(ggml_backend_dev_t device, const char * name, void ** function);
void          guard_backend_free(ggml_backend_t backend); // what it throws is logged

// ---- RPC ----------------------------------------------------------------------------------------------------------

// As in ggml-rpc.h. They are looked up by name, so that neither header nor library is needed where ggml has no RPC.
typedef ggml_backend_reg_t (*rpc_add_server_fn)(const char * endpoint);
typedef void (*rpc_start_server_fn)(const char * endpoint, const char * cache_dir, size_t n_threads, size_t n_devices,
                                    ggml_backend_dev_t * devices);

mllama_status guard_rpc_function(const char * name, void ** function); // NULL: ggml has no RPC
// *found: whether the worker has devices. Those that are not there yet are registered.
mllama_status guard_rpc_add(rpc_add_server_fn add_server, const char * endpoint, bool * found);
mllama_status guard_rpc_serve(rpc_start_server_fn start_server, const char * endpoint, const char * cache_dir,
                              int32_t n_threads, int32_t n_devices, ggml_backend_dev_t * devices);

// ---- buffers and tensors ------------------------------------------------------------------------------------------

// One buffer for all tensors of ctx
mllama_status guard_alloc_tensors(struct ggml_context * ctx, ggml_backend_buffer_type_t type,
                                  ggml_backend_buffer_t * buffer);
mllama_status guard_measure_tensors(struct ggml_context * ctx, ggml_backend_buffer_type_t type, uint64_t * size);
mllama_status guard_alloc_buffer(ggml_backend_buffer_type_t type, size_t size, ggml_backend_buffer_t * buffer);
// CPU memory that is there already
mllama_status guard_wrap_memory(void * data, size_t size, ggml_backend_buffer_t * buffer);
mllama_status guard_place_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor * t, void * address);
mllama_status guard_clear(ggml_backend_buffer_t buffer, uint8_t value);
mllama_status guard_set(struct ggml_tensor * t, const void * data, size_t offset, size_t size);
mllama_status guard_get(const struct ggml_tensor * t, void * data, size_t offset, size_t size);
bool          guard_is_host(ggml_backend_buffer_t buffer);      // false if that cannot be told
void          guard_buffer_free(ggml_backend_buffer_t buffer);  // what it throws is logged

// A context of `size` bytes for tensors without data, never NULL after MLLAMA_OK. ggml_free gives it back.
mllama_status guard_context(size_t size, struct ggml_context ** ctx);

// ---- graphs -------------------------------------------------------------------------------------------------------

mllama_status guard_sched_new(ggml_backend_t * backends, int32_t n_backends, size_t n_nodes,
                              ggml_backend_sched_t * sched);
// Makes the buffers of a graph, and with `place` puts its tensors there. *ok: whether there was room. After an
// exception *sched is NULL and its memory is lost: ggml may have freed a buffer that it still lists, and would free it
// again.
mllama_status guard_sched_alloc(ggml_backend_sched_t * sched, struct ggml_cgraph * gf, bool place, bool * ok);
mllama_status guard_sched_measure(ggml_backend_sched_t * sched, struct ggml_cgraph * gf, size_t * sizes);
// Begins to compute; meanwhile the caller may do something else, before guard_sched_wait.
mllama_status guard_sched_begin(ggml_backend_sched_t sched, struct ggml_cgraph * gf, enum ggml_status * status);
mllama_status guard_sched_wait(ggml_backend_sched_t sched);
// On one backend
mllama_status guard_compute(ggml_backend_t backend, struct ggml_cgraph * gf, enum ggml_status * status);
void          guard_sched_free(ggml_backend_sched_t sched);     // what it throws is logged

// ---- files --------------------------------------------------------------------------------------------------------

mllama_status guard_gguf_open(const char * path, struct gguf_context ** gguf); // NULL: not readable

#ifdef __cplusplus
}
#endif
