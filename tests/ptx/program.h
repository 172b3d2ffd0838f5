// A kernel's PTX as a list of instructions whose operands are numbers.
//
// PTX is an assembly language with as many registers as a kernel wants. Types belong to instructions, so a register
// here is 64 bits, of which an instruction reads those that its type has. Constants, addresses of parameters and
// special registers (%tid.x) become registers too: they are filled in before a warp starts, and an operand is always
// the number of a register.
//
//     @%p1 bra $L__BB0_2;                      guard p1; target, the instruction behind the label
//     setp.lt.s32 %p1, %r1, 5;                 registers p1, r1 and the one that holds 5
//     ld.shared.v2.u32 {%r2, %r3}, [%r1+8];    registers r2, r3; address r1 + 8
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace ptx {

struct Warp;
struct Instruction;

// The lanes of a warp that execute an instruction, as bits.
using Lanes = std::uint32_t;
constexpr int warp_size = 32;
constexpr Lanes all_lanes = 0xffffffff;

// What an instruction does to a warp's registers and to memory.
using Meaning = std::function<void(Warp&, const Instruction&, Lanes)>;

// How an instruction moves its lanes on. Those of `whole_warp` are executed when all 32 lanes have arrived.
enum class Flow { next, branch, exit, whole_warp, block_barrier, cluster_barrier };

struct Address {
  int base;    // register
  std::int64_t offset;
};

struct Instruction {
  std::string opcode, text;
  int line;
  int guard = -1;    // register, or none
  bool guard_value = true;
  std::vector<int> registers;
  std::vector<Address> addresses;
  std::size_t target = 0;
  Flow flow = Flow::next;
  Meaning meaning;
};

struct Kernel {
  std::string name;
  std::size_t parameter_bytes;
  std::vector<Instruction> code;
  int registers = 0;
  std::map<int, std::uint64_t> constants;
  std::map<std::string, int> special;    // registers by name; that of the parameters' address is "parameters"
};

// The 32-bit address where a block's shared memory begins, not 0, as on a GPU.
constexpr std::uint32_t shared_base = 0x400;

// The kernels of one file that nvcc -ptx wrote. Ends the process at anything it does not know.
std::vector<Kernel> read_kernels(const std::string& path);

// Flow and meaning by the opcode (instructions.cpp). False: unknown.
bool explain(Instruction& instruction);

}    // namespace ptx
