#pragma once

#include <filesystem>

#include "enat/enat.hpp"

/// Writes tokens as NumPy's .npy, int64 [count, grid, grid]. Throws enat::Error where it cannot.
void write_npy(const std::filesystem::path& file, const enat::Tokens& tokens);
