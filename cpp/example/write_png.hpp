#pragma once

#include <cstddef>
#include <filesystem>

#include "enat/enat.hpp"

/// Throws enat::InputError where a sheet of so many pictures is larger than libpng writes.
void check_sheet(std::size_t count, std::size_t columns, std::size_t image_size);

/// Writes the pictures as one sheet, row by row, with a thin white line between them. Throws enat::Error with the reason where it cannot.
void write_png(const std::filesystem::path& file, const enat::Images& images, std::size_t columns);
