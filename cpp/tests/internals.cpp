// The numbers inside the library, for Python to compare with its own.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>

#include "cache_folder.hpp"
#include "cores.hpp"
#include "execution_providers.hpp"
#include "graphs.hpp"
#include "manifest.hpp"
#include "noise.hpp"
#include "profiles.hpp"
#include "schedule.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void test_philox(const std::uint32_t* counter, const std::uint32_t* key, std::uint32_t* result) {
    const auto words = enat::philox4x32({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
    std::copy(words.begin(), words.end(), result);
}

/// Of the numbers from `first` on: every value that a random word can give is within 2²⁴.
EXPORT void test_uniform(std::uint32_t first, std::uint32_t count, float* result) {
    for (std::uint32_t i = 0; i < count; ++i) result[i] = enat::uniform(first + i);
}

EXPORT void test_gumbel(std::uint32_t first, std::uint32_t count, float* result) {
    for (std::uint32_t i = 0; i < count; ++i) result[i] = enat::gumbel(first + i);
}

/// choice, confidence: [count, length].
EXPORT void test_step_noise(const std::uint64_t* seeds, std::uint64_t count, std::int64_t step, std::int64_t length, float* choice,
                            float* confidence) {
    const enat::Noise noise = enat::step_noise({seeds, seeds + count}, step, length);
    std::copy(noise.choice.begin(), noise.choice.end(), choice);
    std::copy(noise.confidence.begin(), noise.confidence.end(), confidence);
}

/// counts: (masked, keep) of every step; scalars: (guidance, sampling temperature, mask temperature). Returns how many steps there are.
EXPORT std::int64_t test_schedule(std::int64_t length, std::int64_t steps, double cfg_scale, double mask_temp, double samp_temp,
                                  std::int64_t* counts, double* scalars) {
    const auto all = enat::schedule(length, steps, cfg_scale, mask_temp, samp_temp);
    for (const enat::Step& step : all) {
        *counts++ = step.masked;
        *counts++ = step.keep;
        *scalars++ = step.guidance;
        *scalars++ = step.sampling_temperature;
        *scalars++ = step.mask_temperature;
    }
    return static_cast<std::int64_t>(all.size());
}

/// The quota of a process whose /proc and /sys lie in a folder; 0 where there is none.
EXPORT double test_least_quota(const char* root) { return enat::least_quota(root).value_or(0); }

EXPORT int test_core_count(const char* root) { return enat::core_count({0, 1, 2, 3, 4}, root); }

EXPORT int test_allowed_threads() { return enat::allowed_threads(); }

/// 0 where a batch is never too large.
EXPORT std::uint64_t test_pictures_at_once(std::int64_t grid, std::int64_t dim, const char* device, int threads, int slots) {
    enat::Model model;
    model.grid = grid;
    model.dim = dim;
    enat::Options options;
    options.device = device;
    options.threads = threads;
    options.slots = slots;
    return enat::pictures_at_once(model, options).value_or(0);
}

/// 0 where a provider has no limit.
EXPORT std::uint64_t test_most_pictures(const char* provider) {
    enat::Options options;
    options.provider = provider;
    return enat::most_pictures(options).value_or(0);
}

/// What the TensorRT provider builds one of an engine's graphs for, a line each for its least, best and largest shapes. modulation: the
/// condition's output that it reads, or nothing.
EXPORT const char* test_general_profile(const char* engine, int graph, const char* modulation) {
    static std::string found;
    const enat::Manifest manifest = enat::read_manifest(engine);
    Ort::Env env;
    const Ort::Session condition(env, (manifest.root / "condition.onnx").c_str(), Ort::SessionOptions());
    const enat::Shape inner = enat::inner_shape(condition, modulation);
    found.clear();
    for (const std::string& line : enat::general_profile(manifest.model, static_cast<enat::Graph>(graph), inner)) found += line + "\n";
    return found.c_str();
}

/// Where what is compiled from an engine is kept, or why it cannot be.
EXPORT const char* test_cache_folder(const char* engine) {
    static std::string found;
    try {
        found = enat::cache_folder(enat::read_manifest(engine).hash, "kind").string();
    } catch (const std::exception& error) {
        found = error.what();
    }
    return found.c_str();
}
