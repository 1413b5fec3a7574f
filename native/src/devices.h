// What ggml can compute on: every device with the facts that do not change, asked for once.
#pragma once

#include "status.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MAX_DEVICES = 16 }; // that one model may be offloaded to

// Registers ggml's devices and checks that this ggml is the one compiled against. Notices devices that were added
// since.
mllama_status devices_init(void);

// The rest is about what the last devices_init has found.
int32_t            devices_count(void);
ggml_backend_dev_t devices_get(int32_t index); // NULL: no such device
ggml_backend_dev_t devices_cpu(void);

// Starts a device and stops it again, unless that went well before. MLLAMA_ERR_BACKEND: it cannot be used, for these
// reasons.
mllama_status      device_start(ggml_backend_dev_t device);

const char *       device_name(ggml_backend_dev_t device);
const char * device_label(ggml_backend_dev_t device); // name for messages; that of a remote device tells its worker
bool               device_is_cpu(ggml_backend_dev_t device);
bool               device_is_gpu(ggml_backend_dev_t device);
bool               device_is_rpc(ggml_backend_dev_t device);
bool               device_is_accel(ggml_backend_dev_t device); // takes part in computing with the CPU (BLAS, AMX)

#ifdef __cplusplus
}
#endif
