// Stands in for libnvrtc.so where there is no GPU: compiles the kernels with the C++ compiler, for emulator.h.

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

struct Program {
    std::vector<std::pair<std::string, std::string>> files;  // the source first
    std::string log, library;
};

static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

extern "C" {

int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return 0;
}

int nvrtcCreateProgram(void** out, const char* source, const char* name, int count, const char* const* headers,
    const char* const* names) {
    Program* program = new Program;
    program->files.emplace_back(name, source);
    for (int i = 0; i < count; ++i) program->files.emplace_back(names[i], headers[i]);
    *out = program;
    return 0;
}

int nvrtcCompileProgram(void* handle, int count, const char* const* options) {
    Program& program = *(Program*)handle;
    char folder[] = "/tmp/laps-nvrtc-XXXXXX";
    if (!mkdtemp(folder)) return 6;
    const std::string at = folder;
    for (auto& [name, text] : program.files) {
        std::string source = text;
        std::smatch found;
        // What the driver's stand-in calls, beside each kernel.
        const std::regex kernel("KERNEL (\\w+)\\(const __grid_constant__ (\\w+) ");
        if (std::regex_search(text, found, kernel)) {
            source += "\nextern \"C\" int " + found[1].str() +
                "_emulated(unsigned bx, unsigned by, unsigned tx, size_t shared, void** parameters) {\n    const " +
                found[2].str() + " call = *(const " + found[2].str() +
                "*)parameters[0];\n    return emulator::launch({bx, by, 1}, {tx, 1, 1}, shared, [&] { " +
                found[1].str() + "(call); });\n}\n";
        }
        std::ofstream(at + "/" + name) << source;
    }
    std::string command = std::string(getenv("LAPS_EMULATOR_COMPILER")) + " -x c++ -shared -fPIC -DLAPS_EMULATED -I " +
        at + " -I " + getenv("LAPS_EMULATOR_FOLDER");
    for (int i = 0; i < count; ++i) {
        // Those of the GPU's compiler mean nothing here.
        const std::string option = options[i];
        if (option.rfind("-D", 0) == 0 || option.rfind("--std", 0) == 0) command += " " + option;
    }
    command += " " + at + "/" + program.files[0].first + " -o " + at + "/kernel.so 2> " + at + "/log";
    const int status = system(command.c_str());
    program.log = read(at + "/log");
    program.library = status == 0 ? read(at + "/kernel.so") : "";
    std::filesystem::remove_all(at);
    return status == 0 ? 0 : 6;
}

int nvrtcGetProgramLogSize(void* program, size_t* size) {
    *size = ((Program*)program)->log.size() + 1;
    return 0;
}
int nvrtcGetProgramLog(void* program, char* log) {
    strcpy(log, ((Program*)program)->log.c_str());
    return 0;
}
int nvrtcGetCUBINSize(void* program, size_t* size) {
    *size = ((Program*)program)->library.size();
    return 0;
}
int nvrtcGetCUBIN(void* program, char* cubin) {
    memcpy(cubin, ((Program*)program)->library.data(), ((Program*)program)->library.size());
    return 0;
}
int nvrtcDestroyProgram(void** program) {
    delete (Program*)*program;
    *program = nullptr;
    return 0;
}
}
