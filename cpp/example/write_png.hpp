#pragma once

#include <filesystem>

#include "enat/enat.hpp"

/// Writes the pictures as one sheet, row by row, with a thin white line between them. Throws enat::Error where it cannot.
void write_png(const std::filesystem::path& file, const enat::Images& images, std::size_t columns);
