#include "write_png.hpp"

#include <png.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

constexpr std::size_t gap = 2;              // pixels
constexpr std::size_t longest = 1'000'000;  // pixels: libpng's own limit
constexpr std::size_t most = 0xFFFFFFFF;    // bytes

std::size_t rows_of(std::size_t count, std::size_t columns) { return (count + columns - 1) / columns; }
std::size_t pixels(std::size_t pictures, std::size_t size) { return pictures * (size + gap) - gap; }

}  // namespace

void check_sheet(std::size_t count, std::size_t columns, std::size_t image_size) {
    const std::size_t width = pixels(std::min(columns, count), image_size), height = pixels(rows_of(count, std::min(columns, count)), image_size);
    if (width <= longest && height <= longest && width * height * 3 <= most) return;
    throw enat::InputError("a sheet of " + std::to_string(count) + " pictures in " + std::to_string(std::min(columns, count)) +
                           " columns would have " + std::to_string(width) + "×" + std::to_string(height) + " pixels; expected at most " +
                           std::to_string(longest) + " a side and " + std::to_string(most / 3) + " in all");
}

void write_png(const std::filesystem::path& file, const enat::Images& images, std::size_t columns) {
    columns = std::min(columns, images.count);
    const std::size_t width = pixels(columns, images.width), height = pixels(rows_of(images.count, columns), images.height);
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
        throw enat::Error(png.message);
    }
}
