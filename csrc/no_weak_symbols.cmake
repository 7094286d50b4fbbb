# Fails the build when an object compiled for one instruction set holds a symbol that the linker may share.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  if(symbols MATCHES "[^\n]* [WVu] [^\n]*")
    message(FATAL_ERROR "${object} holds a shareable symbol (template or inline function outside an anonymous namespace): ${CMAKE_MATCH_0}")
  endif()
endforeach()
