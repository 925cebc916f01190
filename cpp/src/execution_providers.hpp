// Where ONNX Runtime runs the graphs, and with which kernels.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <optional>
#include <string>

#include "enat/enat.hpp"
#include "graphs.hpp"
#include "manifest.hpp"

namespace enat {

/// "ONNX Runtime" and its version, for messages.
std::string runtime_version();

/// Settings for the session of one of an engine's graphs. modulation: of encoder and decoder, the shape of the condition's output for them
/// beyond its first axis. Throws InputError for options out of their range, BackendError where this build of ONNX Runtime does not have the
/// execution provider or cannot start it.
Ort::SessionOptions make_session_options(Ort::Env& env, const Manifest& manifest, const Options& options, Graph graph,
                                         const Shape& modulation);

/// Of how many pictures the network's features fill the caches of a slot's share of the threads: with more it draws no faster, but takes
/// more memory. Nothing on a GPU, where more are faster.
std::optional<std::size_t> pictures_at_once(const Model& model, const Options& options);

/// How many pictures a provider can run together at most. Nothing where that is left to memory.
std::optional<std::size_t> most_pictures(const Options& options);

}  // namespace enat
