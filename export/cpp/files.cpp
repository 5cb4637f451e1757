#include "files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace fs = std::filesystem;

UserError unwritable(const fs::path& path, const std::string& reason) {
  return UserError("output: got " + path.string() + "; it cannot be written (" + reason +
                   "); give another place, or mend this one");
}

WrittenAside::WrittenAside(const fs::path& path) : path_(path), aside_(path) {
  // The suffix stays last: niftilib chooses the format by it.
  aside_.replace_filename(".partial-" + std::to_string(getpid()) + "-" + path.filename().string());
  std::error_code error;
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), error);
  if (error) throw unwritable(path, error.message());
}

WrittenAside::~WrittenAside() {
  std::error_code none;
  fs::remove(aside_, none);
}

void WrittenAside::publish() {
  const int file = open(aside_.c_str(), O_RDONLY);
  const bool flushed = file >= 0 && fsync(file) == 0;
  const std::string reason = std::strerror(errno);
  if (file >= 0) close(file);
  if (!flushed) throw unwritable(path_, reason);
  std::error_code error;
  fs::rename(aside_, path_, error);
  if (error) throw unwritable(path_, error.message());
}
