// What error messages are made of.
#pragma once

#include <filesystem>
#include <string>

namespace enat {

/// The text on one line, at most `longest` bytes of it: control characters are shown as '?'.
inline std::string one_line(std::string text, std::size_t longest = 2000) {
    if (text.size() > longest) {
        while (longest > 0 && (text[longest] & 0xC0) == 0x80) --longest;  // between two characters of UTF-8
        text = text.substr(0, longest) + "…";
    }
    for (char& letter : text) {
        if (static_cast<unsigned char>(letter) < ' ' || letter == '\x7f') letter = '?';
    }
    return text;
}

/// The first line of an error of ONNX Runtime.
inline std::string first_line(const std::string& text) { return one_line(text.substr(0, text.find('\n'))); }

inline std::string shown(const std::filesystem::path& path) { return one_line(path.string()); }

}  // namespace enat
