// Random numbers that are a function of (seed, step, position) alone: the same in every batch, backend and language.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace enat {

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

/// u = bits·2⁻²⁴ in [0, 1), of a random word's 24 upper bits.
float uniform(std::uint32_t bits);

/// The standard Gumbel −ln(−ln((bits + 0.5)·2⁻²³)), computed in float64, of a random word's 23 upper bits.
float gumbel(std::uint32_t bits);

struct Noise {
    std::vector<float> choice, confidence;  // [batch, length] each, indexed by position
};

/// The noise of one step for images with these seeds.
Noise step_noise(const std::vector<std::uint64_t>& seeds, std::int64_t step, std::int64_t length);

}  // namespace enat
