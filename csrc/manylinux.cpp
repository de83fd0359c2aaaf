// Symbols that the headers of a newer glibc and libstdc++ refer to, and that the systems of
// manylinux_2_28 lack. Linked into wheels alone (POLYHEAD_LIBC in CMakeLists.txt).
#include <new>
#include <sstream>

// False: reference counts stay atomic.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// Of the messages of torch's checks.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
