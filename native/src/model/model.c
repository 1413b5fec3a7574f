#include "model/model.h"

#include "model/weights.h"

#include <stdlib.h>
#include <string.h>

mllama_model_params mllama_model_default_params(void) {
    return (mllama_model_params) { .vision_device = -1, .main_gpu = -1, .use_mmap = true };
}

static mllama_status open_files(mllama_model * model, const char * text_path, const char * mmproj_path) {
    TRY(gguf_file_open(text_path, &model->text_file));
    if (!gguf_file_tensor(model->text_file, "token_embd.weight", NULL) && gguf_file_has_vision(model->text_file)) {
        return fail(MLLAMA_ERR_FILE, "%s: a vision projector, not a text model; give it as the mmproj file", text_path);
    }
    if (mmproj_path) {
        TRY(gguf_file_open(mmproj_path, &model->vision_file));
    } else if (gguf_file_has_vision(model->text_file)) {
        model->vision_file = model->text_file;
    }
    return MLLAMA_OK;
}

static mllama_status load(mllama_model * model, const char * text_path, const char * mmproj_path,
                          const mllama_model_params * params) {
    model->no_alloc = params->no_alloc;
    TRY(devices_init());
    TRY(open_files(model, text_path, mmproj_path));
    TRY(hparams_read_text(model->text_file, &model->hp));
    if (model->vision_file) {
        TRY(hparams_read_vision(model->vision_file, &model->hp));
    }
    TRY(layout_recognise(model->text_file, model->vision_file, &model->layout));
    TRY(device_plan_make(params, model->hp.pub.n_layer, &model->plan));
    TRY(weights_find(model, params->allow_quantized_vision));
    return params->check_only ? MLLAMA_OK : weights_load(model, params);
}

mllama_status mllama_model_load(const char * text_path, const char * mmproj_path, const mllama_model_params * params,
                                mllama_model ** out) {
    if (!text_path || !params || !out) {
        return fail(MLLAMA_ERR_ARGUMENT, "mllama_model_load: NULL argument");
    }
    *out = NULL;
    mllama_model * model = calloc(1, sizeof(*model));
    if (!model) {
        return fail(MLLAMA_ERR_MEMORY, "%s: out of memory", text_path);
    }
    const mllama_status status = load(model, text_path, mmproj_path, params);
    if (status != MLLAMA_OK) {
        mllama_model_free(model);
        return status;
    }
    *out = model;
    return MLLAMA_OK;
}

void mllama_model_free(mllama_model * model) {
    if (!model) {
        return;
    }
    weights_free(model->weights); // before the files: buffers may lie in their mappings
    if (model->vision_file != model->text_file) {
        gguf_file_close(model->vision_file);
    }
    gguf_file_close(model->text_file);
    device_plan_free(&model->plan);
    hparams_free(&model->hp);
    free(model->layers);
    free(model->vision.local);
    free(model->vision.global);
    free(model);
}

const mllama_hparams * mllama_model_hparams(const mllama_model * model) {
    return &model->hp.pub;
}

const int32_t * mllama_model_cross_layers(const mllama_model * model) {
    return model->hp.cross_layers;
}

const char * mllama_model_layout(const mllama_model * model) {
    return model->layout.name;
}

const char * mllama_model_repair(const mllama_model * model, int32_t index) {
    return index >= 0 && index < model->layout.n_repairs ? model->layout.repairs[index] : NULL;
}

int32_t mllama_model_n_tensors(const mllama_model * model) {
    return weights_count(model->weights);
}

mllama_status mllama_model_tensor(const mllama_model * model, int32_t index, mllama_tensor_info * info) {
    return weights_info(model->weights, index, info);
}

uint64_t mllama_model_size(const mllama_model * model) {
    uint64_t           size = 0;
    mllama_tensor_info info;
    for (int32_t i = 0; i < weights_count(model->weights); i++) {
        if (weights_info(model->weights, i, &info) == MLLAMA_OK) {
            size += info.n_bytes;
        }
    }
    return size;
}
