// What error messages are made of.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace enat {

/// How many bytes the character of UTF-8 has that begins at `start`; 0 where none does.
inline std::size_t character_size(const std::string& text, std::size_t start) {
    const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    const unsigned first = byte(start), second = byte(start + 1);
    if (first < 0x80) return 1;
    const std::size_t size = first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xF0 && first < 0xF5 ? 4 : 0;
    for (std::size_t i = 1; i < size; ++i) {
        if ((byte(start + i) & 0xC0) != 0x80) return 0;
    }
    // Longer than it need be, half a surrogate pair, beyond the last character.
    const bool none = (first == 0xE0 && second < 0xA0) || (first == 0xED && second >= 0xA0) || (first == 0xF0 && second < 0x90) ||
                      (first == 0xF4 && second >= 0x90);
    return none ? 0 : size;
}

/// The text on one line, at most `longest` bytes of it: control characters, and bytes that are no UTF-8, are shown as '?'.
inline std::string one_line(const std::string& text, std::size_t longest = 2000) {
    std::string line;
    for (std::size_t i = 0, size = 0; i < text.size(); i += std::max<std::size_t>(size, 1)) {
        size = character_size(text, i);
        if (i + size > longest) return line + "…";
        const bool control = size == 1 && (static_cast<unsigned char>(text[i]) < ' ' || text[i] == '\x7f');
        if (size == 0 || control) {
            line += '?';
        } else {
            line.append(text, i, size);
        }
    }
    return line;
}

/// The first line of an error of ONNX Runtime.
inline std::string first_line(const std::string& text) { return one_line(text.substr(0, text.find('\n'))); }

inline std::string shown(const std::filesystem::path& path) { return path.empty() ? "''" : one_line(path.string()); }

/// A number with as few digits as tell it from all others.
inline std::string shown(double number) {
    char text[40];
    for (int digits = 6; digits <= 17; ++digits) {
        std::snprintf(text, sizeof text, "%.*g", digits, number);
        if (std::strtod(text, nullptr) == number) break;
    }
    return text;
}

}  // namespace enat
