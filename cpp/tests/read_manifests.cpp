// Reads the engine directories named on stdin, a line each, and answers each with a line: "ok", or why it was refused.

#include <iostream>
#include <string>

#include "manifest.hpp"

int main() {
    for (std::string folder; std::getline(std::cin, folder);) {
        try {
            enat::read_manifest(folder);
            std::cout << "ok" << std::endl;
        } catch (const enat::EngineError& error) {
            std::cout << error.what() << std::endl;
        }
    }
}
