#pragma once

#include <filesystem>
#include <string>

namespace enat {

/// The SHA-256 of a file, in hexadecimal. Throws EngineError where it cannot be read.
std::string sha256(const std::filesystem::path& file);

/// The same of a text.
std::string sha256_of(const std::string& text);

}  // namespace enat
