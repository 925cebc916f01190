#include "sha256.hpp"

#include <openssl/evp.h>

#include <fstream>
#include <memory>
#include <vector>

#include "enat/enat.hpp"
#include "messages.hpp"

namespace enat {

namespace {

using Context = std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)>;

Context begin() {
    Context context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) throw BackendError("OpenSSL has no SHA-256 here");
    return context;
}

std::string end(const Context& context) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    EVP_DigestFinal_ex(context.get(), digest, &size);
    std::string text;
    for (unsigned i = 0; i < size; ++i) {
        text += "0123456789abcdef"[digest[i] >> 4];
        text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
}

}  // namespace

std::string sha256_of(const std::string& text) {
    const Context context = begin();
    EVP_DigestUpdate(context.get(), text.data(), text.size());
    return end(context);
}

std::string sha256(const std::filesystem::path& file) {
    const Context context = begin();
    std::ifstream stream(file, std::ios::binary);
    std::vector<char> block(1 << 20);
    while (stream.read(block.data(), static_cast<std::streamsize>(block.size())), stream.gcount() > 0) {
        EVP_DigestUpdate(context.get(), block.data(), static_cast<std::size_t>(stream.gcount()));
    }
    if (!stream.eof()) throw EngineError(shown(file) + ": cannot be read");
    return end(context);
}

}  // namespace enat
