// The C interface: exceptions become codes and a line of text.
#include <cmath>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "enat/enat.h"
#include "enat/enat.hpp"
#include "messages.hpp"

struct enat_pipeline {
    enat::Pipeline pipeline;
};

struct enat_preview {
    const enat::Preview& preview;
};

namespace {

thread_local std::string last_error;

enat_status failed(enat_status status, const char* message) noexcept {
    try {
        last_error = message;
    } catch (...) {  // no memory for it either
        last_error.clear();
    }
    return status;
}

/// Calls it; whatever it throws becomes a code.
template <typename Body>
enat_status guarded(Body body) noexcept {
    try {
        body();
        return ENAT_OK;
    } catch (const enat::InputError& error) {
        return failed(ENAT_INPUT_ERROR, error.what());
    } catch (const enat::EngineError& error) {
        return failed(ENAT_ENGINE_ERROR, error.what());
    } catch (const enat::BackendError& error) {
        return failed(ENAT_BACKEND_ERROR, error.what());
    } catch (const enat::Stopped& error) {
        return failed(ENAT_STOPPED, error.what());
    } catch (const std::bad_alloc&) {
        return failed(ENAT_FAILED, "not enough memory");
    } catch (const std::exception& error) {
        return failed(ENAT_FAILED, enat::one_line(error.what()).c_str());
    } catch (...) {
        return failed(ENAT_FAILED, "unknown error");
    }
}

void require(const void* pointer, const char* name) {
    if (pointer == nullptr) throw enat::InputError(std::string("expected a pointer for ") + name + ", got NULL");
}

/// An array of the caller. Throws InputError where no memory could hold so many.
template <typename T>
std::vector<T> array(const T* values, std::size_t count, const char* name) {
    if (count > 0) require(values, name);
    if (count > std::vector<T>().max_size()) throw enat::InputError("expected a number of " + std::string(name) + ", got " + std::to_string(count));
    return {values, values + count};
}

std::optional<double> unless_nan(double value) { return std::isnan(value) ? std::nullopt : std::optional<double>(value); }

enat::Settings convert(const enat_settings& given) {
    enat::Settings settings;
    settings.num = given.num;
    settings.batch_size = given.batch_size;
    if (given.seeds != nullptr && given.seed_count == 1) {
        settings.seed = given.seeds[0];
    } else if (given.seeds != nullptr) {
        if (given.seed_count == 0) throw enat::InputError("expected seed_count to be the number of seeds, got 0");
        settings.seeds = array(given.seeds, given.seed_count, "seeds");
    }
    if (given.steps != 0) settings.steps = given.steps;
    settings.guidance = unless_nan(given.guidance);
    settings.mask_temperature = unless_nan(given.mask_temperature);
    settings.sampling_temperature = unless_nan(given.sampling_temperature);
    if (given.callback != nullptr) {
        settings.callback = [&given](std::size_t step, std::size_t steps, const enat::Preview& preview) {
            const enat_preview handle{preview};
            return given.callback(step, steps, &handle, given.user) != 0;
        };
    }
    return settings;
}

/// Hands pictures over to a caller who will give them back.
void fill(enat_images& images, enat::Images&& drawn) {
    const auto* owner = new enat::Images(std::move(drawn));
    images.count = owner->tokens.count;
    images.height = owner->height;
    images.width = owner->width;
    images.grid = owner->tokens.grid;
    images.pixels = owner->pixels.empty() ? nullptr : owner->pixels.data();
    images.tokens = owner->tokens.values.data();
    images.seeds = owner->tokens.seeds.empty() ? nullptr : owner->tokens.seeds.data();
    images.owner = const_cast<enat::Images*>(owner);
}

}  // namespace

const char* enat_version(void) { return enat::version(); }

const char* enat_last_error(void) { return last_error.c_str(); }

enat_status enat_open(const char* engine, const enat_options* options, enat_pipeline** pipeline) {
    return guarded([&] {
        require(pipeline, "pipeline");
        *pipeline = nullptr;
        require(engine, "engine");
        enat::Options chosen;
        if (options != nullptr) {
            if (options->device != nullptr) chosen.device = options->device;
            if (options->provider != nullptr) chosen.provider = options->provider;
            chosen.threads = options->threads;
            chosen.verify = options->verify != 0;
            if (options->slots != 0) chosen.slots = options->slots;
        }
        *pipeline = new enat_pipeline{enat::Pipeline(engine, chosen)};
    });
}

void enat_close(enat_pipeline* pipeline) { delete pipeline; }

enat_status enat_get_info(const enat_pipeline* pipeline, enat_info* info) {
    return guarded([&] {
        require(pipeline, "pipeline");
        require(info, "info");
        const enat::Model& model = pipeline->pipeline.model();
        const enat::Sampling& own = pipeline->pipeline.sampling();
        *info = {model.grid,
                 model.codes,
                 model.num_classes,
                 own.steps,
                 own.cfg_scale,
                 own.mask_temp,
                 own.samp_temp,
                 pipeline->pipeline.has_images(),
                 !model.class_names.empty()};
    });
}

const char* enat_class_name(const enat_pipeline* pipeline, int64_t number) {
    if (pipeline == nullptr || number < 0) return nullptr;
    const auto& names = pipeline->pipeline.model().class_names;
    return static_cast<std::size_t>(number) < names.size() ? names[static_cast<std::size_t>(number)].c_str() : nullptr;
}

enat_status enat_class_index(const enat_pipeline* pipeline, const char* name, int64_t* number) {
    return guarded([&] {
        require(pipeline, "pipeline");
        require(name, "name");
        require(number, "number");
        *number = pipeline->pipeline.class_index(std::string(name));
    });
}

enat_settings enat_default_settings(void) {
    const enat::Settings own;
    return {own.num, own.batch_size, nullptr, 0, 0, NAN, NAN, NAN, 0, nullptr, nullptr};
}

enat_status enat_generate(const enat_pipeline* pipeline, const int64_t* classes, size_t count, const enat_settings* settings,
                          enat_images* images) {
    return guarded([&] {
        require(images, "images");
        *images = {};
        require(pipeline, "pipeline");
        const enat_settings given = settings == nullptr ? enat_default_settings() : *settings;
        const std::vector<std::int64_t> numbers = array(classes, count, "classes");
        const std::vector<enat::Class> wanted(numbers.begin(), numbers.end());
        enat::Settings chosen = convert(given);
        if (!given.tokens_only) {
            fill(*images, pipeline->pipeline.generate(wanted, chosen));
            return;
        }
        enat::Images drawn;
        drawn.tokens = pipeline->pipeline.generate_tokens(wanted, chosen);
        fill(*images, std::move(drawn));
    });
}

enat_status enat_decode(const enat_pipeline* pipeline, const int64_t* tokens, size_t count, enat_images* images) {
    return guarded([&] {
        require(images, "images");
        *images = {};
        require(pipeline, "pipeline");
        require(tokens, "tokens");
        enat::Tokens given;
        given.count = count;
        given.grid = static_cast<std::size_t>(pipeline->pipeline.model().grid);
        const std::size_t length = given.grid * given.grid;
        if (count > given.values.max_size() / length) throw enat::InputError("expected a number of pictures, got " + std::to_string(count));
        given.values = array(tokens, count * length, "tokens");
        fill(*images, pipeline->pipeline.decode(given));
    });
}

enat_status enat_preview_images(const enat_preview* preview, enat_images* images) {
    return guarded([&] {
        require(images, "images");
        *images = {};
        require(preview, "preview");
        fill(*images, preview->preview.images());
    });
}

void enat_free_images(enat_images* images) {
    if (images == nullptr) return;
    delete static_cast<enat::Images*>(images->owner);
    *images = {};
}
