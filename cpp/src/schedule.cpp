#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "enat/enat.hpp"
#include "manifest.hpp"
#include "messages.hpp"

namespace enat {

namespace {

constexpr double pi = 3.141592653589793;

/// How many of `length` tokens stay masked after step `index`: floor(length · cos(r·π/2)), 0 after the last. In float64 and in this
/// order, as the Python runtime computes it: another rounding could move a token to another step.
std::int64_t kept(std::int64_t length, std::int64_t steps, std::int64_t index) {
    if (index + 1 == steps) return 0;
    const double ratio = static_cast<double>(index + 1) / static_cast<double>(steps);
    return static_cast<std::int64_t>(std::floor(static_cast<double>(length) * std::cos(ratio * pi / 2)));
}

}  // namespace

std::vector<Step> schedule(std::int64_t length, std::int64_t steps, double cfg_scale, double mask_temp, double samp_temp) {
    if (steps < 1 || steps > length) {
        throw InputError("expected 1 to " + std::to_string(length) + " steps, got " + std::to_string(steps));
    }
    for (const auto& [name, value] :
         {std::pair("guidance", cfg_scale), {"mask temperature", mask_temp}, {"sampling temperature", samp_temp}}) {
        if (!(value >= 0 && value <= largest_setting)) {  // not so of NaN
            throw InputError(std::string("expected a ") + name + " of 0 to 1e6, got " + shown(value));
        }
    }
    std::vector<Step> result;
    std::int64_t masked = length;
    for (std::int64_t index = 0; index < steps; ++index) {
        const double remaining = 1 - static_cast<double>(index + 1) / static_cast<double>(steps);
        const std::int64_t keep = kept(length, steps, index);
        const double guidance = cfg_scale * static_cast<double>(index) / static_cast<double>(steps);
        result.push_back({index, masked, keep, guidance, std::max(samp_temp * remaining, 1e-3), mask_temp * remaining});
        masked = keep;
    }
    return result;
}

}  // namespace enat
