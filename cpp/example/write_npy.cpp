#include "write_npy.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

void write_npy(const std::filesystem::path& file, const enat::Tokens& tokens) {
    // Version 1.0 of the format: magic, length of the header (little-endian), a Python dict padded to a multiple of 64 bytes.
    const std::string grid = std::to_string(tokens.grid);
    std::string header =
        "{'descr': '<i8', 'fortran_order': False, 'shape': (" + std::to_string(tokens.count) + ", " + grid + ", " + grid + "), }";
    header.resize((10 + header.size()) / 64 * 64 + 64 - 11, ' ');
    header += '\n';
    errno = 0;
    std::ofstream stream(file, std::ios::binary);
    stream.write("\x93NUMPY\x01\x00", 8);
    stream.put(static_cast<char>(header.size() & 255)).put(static_cast<char>(header.size() >> 8)) << header;
    for (const std::int64_t token : tokens.values) {
        for (int shift = 0; shift < 64; shift += 8) stream.put(static_cast<char>(static_cast<std::uint64_t>(token) >> shift & 255));
    }
    stream.close();
    if (!stream) throw enat::Error(std::strerror(errno));
}
