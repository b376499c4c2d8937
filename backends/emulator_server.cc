// The guest of an emulated ARM device: TVM's RPC loop and the VM, for one session.
// One process serves one session, so that a kernel which crashes, hangs or leaks takes nothing else with it.
// The key is the only password TVM's RPC has. It comes by standard input, because arguments can be read by every user;
// the end of standard input means that the host has gone, even if it was killed, and ends the guest.
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace ffi = tvm::ffi;
constexpr int32_t kMagic = 0xFF271;  // kRPCMagic of TVM, whose handshake this is

bool Handshake(int fd, const std::string& key) {
  int32_t head[2] = {};
  if (recv(fd, head, 8, MSG_WAITALL) != 8 || head[0] != kMagic || head[1] < 0 || head[1] > 4096) return false;
  std::string theirs(head[1], '\0');
  if (recv(fd, &theirs[0], head[1], MSG_WAITALL) != head[1]) return false;
  bool same = theirs == "client:" + key;
  const int32_t accepted[] = {kMagic, 0}, refused[] = {kMagic + 2};  // 0: the length of our own name
  send(fd, same ? accepted : refused, same ? 8 : 4, MSG_NOSIGNAL);
  return same;
}

[[noreturn]] void End(const std::string& folder) {
  static std::mutex first;
  first.lock();
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  _exit(0);
}

char* Bytes(DLTensor* t) {
  if (!ffi::IsContiguous(*t)) throw std::runtime_error("not a contiguous tensor");
  return static_cast<char*>(t->data) + t->byte_offset;
}

int main(int argc, char** argv) try {
  ffi::Function loop = ffi::Function::GetGlobalRequired("rpc.ServerLoop");
  ffi::Function::GetGlobalRequired("ffi.Module.load_from_file.relax.VMExecutable");
  if (argc == 2 && argv[1] == std::string("--check")) return 0;
  int listener = std::atoi(argv[1]);
  std::string folder = argv[2], key;
  std::getline(std::cin, key);
  std::thread([folder] {
    for (char c; read(0, &c, 1) > 0;) continue;
    End(folder);
  }).detach();
  auto path = [folder](std::string name) { return folder + "/" + name; };
  auto load = [path](std::string name) { return ffi::Module::LoadFromFile(path(name)); };
  auto read = [path](DLTensor* t, std::string name) {
    std::ifstream file(path(name), std::ios::binary);
    if (!file.read(Bytes(t), ffi::GetDataSize(*t))) throw std::runtime_error("cannot read a tensor");
  };
  auto write = [path](DLTensor* t, std::string name) {
    std::ofstream file(path(name), std::ios::binary);
    if (!file.write(Bytes(t), ffi::GetDataSize(*t)).flush()) throw std::runtime_error("cannot write a tensor");
  };
  ffi::Function::SetGlobal("tvm.rpc.server.workpath", ffi::Function::FromTyped(path), true);
  ffi::Function::SetGlobal("tvm.rpc.server.load_module", ffi::Function::FromTyped(load), true);
  ffi::Function::SetGlobal("paring.read", ffi::Function::FromTyped(read), true);
  ffi::Function::SetGlobal("paring.write", ffi::Function::FromTyped(write), true);
  for (;;) {
    int client = accept(listener, nullptr, nullptr);
    if (client < 0) return 3;
    timeval patience{5, 0}, forever{0, 0};
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (Handshake(client, key)) {
      setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
      close(listener);
      loop(client);
      End(folder);
    }
    close(client);
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
