// The sampling schedule: how many tokens each step reveals, and at which guidance and temperatures. Chang et al., "MaskGIT", 2022.
#pragma once

#include <cstdint>
#include <vector>

namespace enat {

/// One step of the loop: `masked` tokens enter it, `keep` stay so.
struct Step {
    std::int64_t index, masked, keep;
    double guidance, sampling_temperature, mask_temperature;
};

/// The steps of a run over `length` tokens.
///
/// cfg_scale: guidance at the end; it rises linearly from 0. mask_temp, samp_temp: temperatures at the start; they fall linearly.
/// Throws InputError where a setting is out of its range.
std::vector<Step> schedule(std::int64_t length, std::int64_t steps, double cfg_scale, double mask_temp, double samp_temp);

}  // namespace enat
