// From the tensor table of a file to tensors on devices: which tensors a model must have, their checks, their loading.
#pragma once

#include "model/model.h"

// Looks up and checks every tensor of the model; nothing is loaded yet.
mllama_status weights_find(mllama_model * model, bool allow_quantized_vision);
// Puts them where model->plan says.
mllama_status weights_load(mllama_model * model, const mllama_model_params * params);
void          weights_free(weight_list * list);

int32_t       weights_count(const weight_list * list);
// Bytes of the loaded weights on a device: those read in place, those copied there, and the host's buffer for copying.
void          weights_memory(const weight_list * list, ggml_backend_dev_t device, mllama_memory * memory);

mllama_status weights_info(const weight_list * list, int32_t index, mllama_tensor_info * info);
