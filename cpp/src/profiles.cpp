#include "profiles.hpp"

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace enat {

namespace {

using Range = std::array<std::int64_t, 3>;  // least, best, most

Range exactly(std::int64_t size) { return {size, size, size}; }

}  // namespace

std::array<std::string, 3> general_profile(const Model& model, Graph graph, const Shape& modulation) {
    const std::int64_t length = model.length(), half = std::max<std::int64_t>(1, length / 2);
    const Range batch = {1, 1, tensorrt_images}, rows = {1, 2, 2 * tensorrt_images};  // without guidance as many as pictures
    const Range anything = {0, half, length}, something = {1, half, length};          // masked is never 0: a run ends there
    std::vector<Range> modulated = {rows};
    for (const std::int64_t size : modulation) modulated.push_back(exactly(size));
    std::vector<std::pair<std::string, std::vector<Range>>> inputs;
    switch (graph) {
        case Graph::condition: inputs = {{"labels", {rows}}}; break;
        case Graph::encoder: {
            const Range revealed = {0, std::max<std::int64_t>(1, length / 8), length};
            inputs = {{"tokens", {batch, revealed}},
                      {"positions", {batch, revealed}},
                      {"features", {rows, anything, exactly(model.dim)}},
                      {"encoder_modulation", modulated}};
            break;
        }
        case Graph::decoder:
            inputs = {{"positions", {batch, something}},
                      {"features", {rows, anything, exactly(model.dim)}},
                      {"decoder_modulation", modulated}};
            break;
        case Graph::image_decoder: inputs = {{"tokens", {batch, exactly(length)}}, {"positions", {batch, exactly(length)}}}; break;
        case Graph::sampler: break;  // not TensorRT's
    }
    std::array<std::string, 3> profile;
    for (std::size_t which = 0; which < profile.size(); ++which) {
        for (const auto& [name, axes] : inputs) {
            std::string shape;
            for (const Range& axis : axes) shape += (shape.empty() ? "" : "x") + std::to_string(axis[which]);
            profile[which] += (profile[which].empty() ? "" : ",") + name + ":" + shape;
        }
    }
    return profile;
}

}  // namespace enat
