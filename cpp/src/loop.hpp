// The sampling loop: which graph runs when, on what.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "enat/enat.hpp"
#include "graphs.hpp"
#include "manifest.hpp"
#include "schedule.hpp"

namespace enat {

/// (step, tokens, masked): every token as chosen so far, and which are not revealed yet; both [batch, length].
using OnStep = std::function<void(const Step&, const std::vector<std::int64_t>&, const std::vector<std::uint8_t>&)>;

/// Draws one batch.
///
/// labels, seeds: one an image; steps: from `schedule`. Returns the tokens [batch, length], by position. `on_step`, where there is one,
/// is called after every step. Throws EngineError for graphs that do not keep to the contract, BackendError where they fail.
std::vector<std::int64_t> sample(const Graphs& graphs, const Model& model, const std::vector<std::int64_t>& labels,
                                 const std::vector<std::uint64_t>& seeds, const std::vector<Step>& steps, const OnStep& on_step);

/// tokens [batch, length], by position → their pictures.
Images decode(const Graphs& graphs, const Model& model, const std::vector<std::int64_t>& tokens);

}  // namespace enat
