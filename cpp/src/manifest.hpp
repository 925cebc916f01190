// The engine's manifest, read with every check of the contract.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>

#include "enat/enat.hpp"

namespace enat {

/// What an engine directory says of itself.
struct Manifest {
    std::filesystem::path folder;
    Model model;
    Sampling sampling;
    std::string precision, float_type;
    std::int64_t weight_bits = 8;  // of the quantized weights, at most
    std::set<std::string> files;

    bool has(const std::string& name) const { return files.count(name) > 0; }
    /// Throws EngineError where the engine cannot make pictures.
    void require_images() const;
};

/// Reads and checks an engine directory: format, version, sizes and hashes (of files over 64 MiB only with `verify`).
///
/// Throws EngineError that names the file, what was found and what was expected.
Manifest read_manifest(const std::filesystem::path& folder, bool verify = false);

}  // namespace enat
