// Where what is compiled for this machine is kept. Not in engines, whose files are listed with their hashes.
#pragma once

#include <filesystem>
#include <string>

namespace enat {

/// The folder for what is compiled from the engine of a folder, as of the Python runtime: in ENAT_CACHE, else in the user's cache folder.
/// Empty where ENAT_CACHE is, or where the user's cannot be written. kind: of what is compiled. Throws InputError where ENAT_CACHE cannot
/// be written.
std::filesystem::path cache_folder(const std::string& hash, const std::string& kind);

}  // namespace enat
