#include "noise.hpp"

#include <cmath>

namespace enat {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
    constexpr int rounds = 10;
    for (int round = 0; round < rounds; ++round) {
        if (round > 0) {
            key[0] += 0x9E3779B9u;  // mod 2³², as unsigned numbers are
            key[1] += 0xBB67AE85u;
        }
        const std::uint64_t first = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(second),
                   static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(first)};
    }
    return counter;
}

float uniform(std::uint32_t bits) { return static_cast<float>(bits) * 0x1p-24f; }

float gumbel(std::uint32_t bits) { return static_cast<float>(-std::log(-std::log((bits + 0.5) * 0x1p-23))); }

Noise step_noise(const std::vector<std::uint64_t>& seeds, std::int64_t step, std::int64_t length) {
    Noise noise;
    const std::size_t size = seeds.size() * static_cast<std::size_t>(length);
    noise.choice.reserve(size);
    noise.confidence.reserve(size);
    for (const std::uint64_t seed : seeds) {
        for (std::int64_t position = 0; position < length; ++position) {
            const auto words = philox4x32({static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(step), 0, 0},
                                          {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
            noise.choice.push_back(uniform(words[0] >> 8));
            noise.confidence.push_back(gumbel(words[1] >> 9));
        }
    }
    return noise;
}

}  // namespace enat
