// The engine's manifest, read with every check of the contract.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "enat/enat.hpp"

namespace enat {

constexpr double largest_setting = 1e6;  // of sampling: what is computed from it stays finite in float32

/// Device, inode, bytes and time of the last change in nanoseconds: another one is another file. Nothing where there is no file.
using Stamp = std::optional<std::array<std::int64_t, 4>>;
Stamp stamp_of(const std::filesystem::path& file);

/// A file as the manifest lists it, and as it was when it was checked.
struct File {
    std::int64_t size = 0;
    std::string sha256;
    Stamp stamp;
};

/// What an engine directory says of itself.
struct Manifest {
    std::filesystem::path folder;  // as it was given, for messages
    std::filesystem::path root;    // where that led when it was read, wherever a link leads later
    std::string hash;              // of the manifest without builds: what the engine is, as in Python
    Model model;
    Sampling sampling;
    std::string precision, float_type;
    std::int64_t weight_bits = 8;  // of the quantized weights, at most
    std::map<std::string, File> files;

    bool has(const std::string& name) const { return files.count(name) > 0; }
    /// Throws EngineError where the engine cannot make pictures.
    void require_images() const;
    /// Throws EngineError where files are not those any more that were checked: another engine was put in its place.
    void require_unchanged() const;
};

/// Reads and checks an engine directory: format, version, sizes and hashes (of files over 64 MiB only with `verify`).
///
/// Throws EngineError that names the file, what was found and what was expected.
Manifest read_manifest(const std::filesystem::path& folder, bool verify = false);

}  // namespace enat
