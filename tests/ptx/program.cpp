// Reads the PTX that nvcc writes: kernels with one parameter, straight code with labels. See program.h.
#include "program.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "layers.h"

namespace ptx {

namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

// Comments become blanks, so that places in the text stay.
std::string without_comments(std::string text) {
  for (std::size_t at = text.find("//"); at != std::string::npos; at = text.find("//", at)) {
    for (; at < text.size() && text[at] != '\n'; ++at) text[at] = ' ';
  }
  return text;
}

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {
    std::ifstream file(path);
    std::stringstream content;
    content << file.rdbuf();
    text_ = without_comments(content.str());
    if (text_.empty()) layers::fail("no PTX in " + path);
    // .extern .shared .align 1024 .b8 NAME[];
    for (std::size_t at = text_.find(".shared "); at != std::string::npos; at = text_.find(".shared ", at + 1)) {
      const std::string declaration = text_.substr(at, text_.find(';', at) - at);
      const std::size_t name = declaration.rfind(' ') + 1;
      shared_.insert(declaration.substr(name, declaration.find('[') - name));
    }
  }

  // .entry NAME( .param .align 8 .b8 NAME_param_0[BYTES] ) .. { statements }
  std::vector<Kernel> kernels() {
    std::vector<Kernel> kernels;
    for (std::size_t at = text_.find(".entry "); at != std::string::npos; at = text_.find(".entry ", at)) {
      const std::size_t name = at + std::string(".entry ").size(), parameters = text_.find('(', name);
      Kernel kernel;
      kernel.name = text_.substr(name, parameters - name);
      kernel.parameter_bytes = std::stoul(text_.substr(text_.find('[', parameters) + 1));
      at = text_.find('{', parameters);
      body(kernel, at + 1);
      kernels.push_back(std::move(kernel));
    }
    return kernels;
  }

 private:
  [[noreturn]] void fail(int line, const std::string& what) const {
    layers::fail(path_ + ":" + std::to_string(line) + ": " + what);
  }

  // Statements up to the brace that closes the kernel.
  void body(Kernel& kernel, std::size_t at) {
    registers_.clear();
    labels_.clear();
    jumps_.clear();
    int line = 1;
    for (std::size_t i = 0; i < at; ++i) line += text_[i] == '\n';
    for (int depth = 1;; ++at) {
      if (at >= text_.size()) fail(line, "the kernel has no end");
      if (text_[at] == '\n') ++line;
      if (is_space(text_[at]) || text_[at] == ';') continue;
      if (text_[at] == '{') {
        ++depth;
      } else if (text_[at] == '}') {
        if (--depth == 0) break;
      } else if (text_[at] == '$') {
        const std::size_t end = text_.find(':', at);
        labels_[text_.substr(at, end - at)] = kernel.code.size();
        at = end;
      } else {
        const std::size_t end = text_.find(';', at);
        statement(kernel, text_.substr(at, end - at), line);
        for (; at < end; ++at) line += text_[at] == '\n';
      }
    }
    for (const auto& [jump, label] : jumps_) kernel.code[jump].target = labels_.at(label);
  }

  void statement(Kernel& kernel, const std::string& text, int line) {
    if (text.rfind(".reg", 0) == 0 || text.rfind(".pragma", 0) == 0) return;    // registers are known by their use
    Instruction i;
    i.text = text;
    i.line = line;
    std::size_t at = 0;
    const auto word = [&] {
      while (at < text.size() && is_space(text[at])) ++at;
      const std::size_t begin = at;
      while (at < text.size() && !is_space(text[at])) ++at;
      return text.substr(begin, at - begin);
    };
    i.opcode = word();
    if (i.opcode[0] == '@') {
      i.guard_value = i.opcode[1] != '!';
      i.guard = operand(kernel, i.opcode.substr(i.guard_value ? 1 : 2), line);
      i.opcode = word();
    }
    if (!explain(i)) fail(line, "an instruction that the PTX machine does not know: " + text);
    while (at < text.size()) {
      if (text[at] == '[') {
        const std::size_t end = text.find(']', at);
        i.addresses.push_back(address(kernel, text.substr(at + 1, end - at - 1), line));
        at = end + 1;
        continue;
      }
      const std::size_t end = std::min(text.find_first_of(" \t\n,{}|[", at), text.size());
      const std::string name = text.substr(at, end - at);
      if (name.empty()) {
        ++at;
      } else if (name[0] == '$') {
        jumps_.emplace_back(kernel.code.size(), name);
      } else {
        i.registers.push_back(operand(kernel, name, line));
      }
      at = std::max(at, end);
    }
    kernel.code.push_back(std::move(i));
  }

  Address address(Kernel& kernel, const std::string& text, int line) {
    const std::size_t plus = text.find('+');
    const std::int64_t offset = plus == std::string::npos ? 0 : std::stoll(text.substr(plus + 1));
    return {operand(kernel, text.substr(0, plus), line), offset};
  }

  // The register of an operand, which is added where it is new.
  int operand(Kernel& kernel, const std::string& name, int line) {
    const auto [entry, is_new] = registers_.try_emplace(name, kernel.registers);
    if (!is_new) return entry->second;
    const int number = kernel.registers++;
    if (shared_.count(name) != 0) {
      kernel.constants[number] = shared_base;
    } else if (name == kernel.name + "_param_0") {
      kernel.special["parameters"] = number;
    } else if (name[0] == '%' && name.find('.') != std::string::npos) {
      kernel.special[name] = number;
    } else if (name.rfind("%cluster_", 0) == 0) {
      kernel.special[name] = number;
    } else if (std::isdigit(static_cast<unsigned char>(name[0])) || name[0] == '-') {
      kernel.constants[number] = constant(name);
    } else if (name[0] != '%' && name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_") != std::string::npos) {
      fail(line, "an operand that the PTX machine does not know: " + name);
    }
    return number;
  }

  // 5, -5, 0x1F, and the bits of a float or a double: 0f3F800000, 0d3FF0000000000000.
  static std::uint64_t constant(const std::string& text) {
    const bool bits = text.size() > 2 && (text[1] == 'f' || text[1] == 'd' || text[1] == 'F' || text[1] == 'D');
    if (bits) return std::stoull(text.substr(2), nullptr, 16);
    return text[0] == '-' ? static_cast<std::uint64_t>(std::stoll(text)) : std::stoull(text, nullptr, 0);
  }

  std::string path_, text_;
  std::set<std::string> shared_;
  std::map<std::string, int> registers_;
  std::map<std::string, std::size_t> labels_;
  std::vector<std::pair<std::size_t, std::string>> jumps_;    // from an instruction to a label
};

}    // namespace

std::vector<Kernel> read_kernels(const std::string& path) { return Reader(path).kernels(); }

}    // namespace ptx
