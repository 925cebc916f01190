# embed(FILE NAME HEADER): a file's bytes as `constexpr unsigned char NAME[]`.
function(embed file name header)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
    file(READ "${file}" bytes HEX)
    string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
    configure_file("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/embedded.hpp.in" "${header}" @ONLY)
endfunction()
