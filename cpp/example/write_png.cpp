#include "write_png.hpp"

#include <png.h>

#include <algorithm>
#include <string>
#include <vector>

void write_png(const std::filesystem::path& file, const enat::Images& images, std::size_t columns) {
    constexpr std::size_t gap = 2;
    columns = std::min(columns, images.count);
    const std::size_t rows = (images.count + columns - 1) / columns;
    const std::size_t width = columns * (images.width + gap) - gap, height = rows * (images.height + gap) - gap;
    std::vector<std::uint8_t> sheet(height * width * 3, 255);  // [height, width, 3]
    for (std::size_t i = 0; i < images.count; ++i) {
        const std::size_t top = i / columns * (images.height + gap), left = i % columns * (images.width + gap);
        for (std::size_t y = 0; y < images.height; ++y) {
            const std::uint8_t* line = images[i] + y * images.width * 3;
            std::copy_n(line, images.width * 3, sheet.begin() + static_cast<std::ptrdiff_t>(((top + y) * width + left) * 3));
        }
    }
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(width);
    png.height = static_cast<png_uint_32>(height);
    png.format = PNG_FORMAT_RGB;
    if (png_image_write_to_file(&png, file.c_str(), 0, sheet.data(), 0, nullptr) == 0) {
        throw enat::Error(file.string() + ": cannot be written: " + png.message);
    }
}
