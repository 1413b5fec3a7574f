#include "guard.h"
#include "model/weight_list.h"

#include <stdlib.h>
#include <string.h>

void weights_free(weight_list * list) {
    if (!list) {
        return;
    }
    for (int32_t i = 0; i < list->n_buffers; i++) {
        guard_buffer_free(list->buffers[i].buffer);
        ggml_free(list->buffers[i].context);
    }
    free(list->buffers);
    free(list->items);
    free(list);
}

void weights_memory(const weight_list * list, ggml_backend_dev_t device, mllama_memory * memory) {
    for (int32_t i = 0; i < list->n_buffers; i++) {
        const weight_buffer * b = &list->buffers[i];
        if (b->device == device) {
            *(b->mapped ? &memory->mapped : &memory->weights) += b->size;
        }
    }
    memory->staging = device_is_cpu(device) ? list->staging : 0;
}

int32_t weights_count(const weight_list * list) {
    return list->n;
}

mllama_status weights_info(const weight_list * list, int32_t index, mllama_tensor_info * info) {
    if (index < 0 || index >= list->n) {
        return fail(MLLAMA_ERR_ARGUMENT, "no tensor %d; there are %d", index, list->n);
    }
    const weight * w = &list->items[index];
    info->name      = w->source->name;
    info->type      = ggml_type_name(w->source->type);
    memcpy(info->ne, w->source->ne, sizeof(info->ne));
    info->n_bytes   = ggml_nbytes(w->source);
    info->device    = w->device ? device_name(w->device) : "CPU";
    info->is_vision = w->part == PART_VISION;
    info->layout    = w->repacked ? guard_layout_name(w->repacked) : "";
    return MLLAMA_OK;
}
