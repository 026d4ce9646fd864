-- append: write events of many jobs, each guarded by its holder; renew their leases. Zero events are a heartbeat.
--
-- KEYS  1 open  2 ended  3 repack  then per job: state, log  then per job that ends, in the same order: spec
-- ARGV  1 lease (ms)  2 number of jobs  then per job:
--       holder (TOKEN:ATTEMPT), seq of the first event, number of events, kind, events in compact form,
--       then for the kind '' nothing; 'usage': usage (JSON); 'end': usage or '', closing status, finish reasons (JSON),
--       error (JSON or ''). With 'end' the last event is the terminal one.
-- Returns per job {code, last seq}:
--   ok         written
--   duplicate  everything was there already (a lost reply was retried); a known prefix is skipped, the rest written
--   unknown    no such job; nothing is written
--   fenced     a newer attempt holds the job
--   closed     it has ended, not by this call
--   gap        the log ends before the first event: the server lost what was acknowledged; send again from last seq + 1
--   error      this job's keys are broken; the message is in the third place
-- The usual job costs four commands (HMGET, XADD, PUBLISH, HSET), most of what the call costs; hence the short way
-- through, and numbers given to commands as text: the server formats a Lua number as a double, at 1 us each.
-- flags: allow-oom
-- uses: _ending

local call, KEYS, ARGV = redis.call, KEYS, ARGV
local byte, sub, match, format, tonumber = string.byte, string.sub, string.match, string.format, tonumber
local now = server_ms()
local now_text = format('%d', now)
local middle = ',"at":' .. format('%.3f', now / 1000)
local text_middle = middle .. ',"type":"chunk","index":0,"delta":{"content":'
local lease = tonumber(ARGV[1])
local jobs = tonumber(ARGV[2])
local arg = 3
local next_spec = 4 + 2 * jobs

local function expand(event)
  if byte(event) == 91 then -- [index, n, "text"]
    local index, n, text = match(event, '^%[(%d+),(%d+),(.*)%]$')
    return middle .. ',"type":"chunk","index":' .. index .. ',"delta":{"content":' .. text .. '},"n":' .. n .. '}'
  end
  return middle .. ',' .. sub(event, 2)
end

-- Why a holder may not write: the slow way, taken once per job at most.
local function refuse(state, holder, last, count)
  local s = call('HMGET', state, 'status', 'seq', 'writer')
  if not s[1] then
    return {'unknown', 0}
  end
  local seq = tonumber(s[2])
  if not CLOSED[s[1]] then
    return {'fenced', seq}
  end
  if s[3] == holder and count > 0 and last <= seq then
    return {'duplicate', seq}
  end
  if s[3] ~= '' and s[3] ~= holder then
    return {'fenced', seq}
  end
  return {'closed', seq}
end

local function append(state, log, spec, holder, first, count, kind, from)
  local s = call('HMGET', state, 'holder', 'seq', 'lease')
  local last = first + count - 1
  if s[1] ~= holder then
    return refuse(state, holder, last, count)
  end
  local seq = tonumber(s[2])
  if first > seq + 1 then
    return {'gap', seq}
  end
  if kind ~= '' and ARGV[from + count] ~= '' then
    call('HSET', state, 'usage', ARGV[from + count])
  end
  -- Renewing only when a tenth has passed saves two writes on nearly every call. A lease that ends later than one of now
  -- was given before the server's clock went back: left alone, it would outlive its holder by as much.
  local left = tonumber(s[3]) - now
  if kind ~= 'end' and (left < lease * 0.9 or left > lease) then
    call('HSET', state, 'lease', now + lease)
    call('ZADD', KEYS[1], now + lease, match(log, '{(.*)}'))
  end
  if last <= seq then
    return {count == 0 and 'ok' or 'duplicate', seq}
  end

  local attempt = match(holder, '^.*:(%d+)$')
  local start, stop = from + seq + 1 - first, from + count - 1
  if kind == 'end' then
    stop = stop - 1
  end
  local last_text = format('%d', first + stop - from)
  if start <= stop then
    local pack = start == stop and ARGV[start] or table.concat(ARGV, ',', start, stop)
    call('XADD', log, last_text .. '-0', 'a', attempt, 't', now_text, 'e', '[' .. pack .. ']')
    local channel = sub(log, 1, -4) .. 'chunks'
    for i = start, stop do
      local event, seq_text = ARGV[i], i == stop and last_text or first + i - from
      if byte(event) == 34 then -- a JSON string: content of choice 0, the usual event
        event = '{"v":1,"seq":' .. seq_text .. ',"attempt":' .. attempt .. text_middle .. event .. '},"n":1}'
      else
        event = '{"v":1,"seq":' .. seq_text .. ',"attempt":' .. attempt .. expand(event)
      end
      call('PUBLISH', channel, event)
    end
  end
  if kind ~= 'end' then
    call('HSET', state, 'seq', last_text)
    return {'ok', last}
  end
  local after = from + count
  call('HSET', state, 'finish_reasons', ARGV[after + 2], 'error', ARGV[after + 3])
  end_job({match(log, '{(.*)}'), state, log, spec}, KEYS[1], KEYS[2], KEYS[3], now, last, attempt, ARGV[after + 1],
    ARGV[after - 1], holder)
  return {'ok', last}
end

local EXTRA = {[''] = 0, usage = 1, ['end'] = 4}
local replies = {}
for i = 1, jobs do
  local holder, first, count, kind = ARGV[arg], tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2]), ARGV[arg + 3]
  local spec
  if kind == 'end' then
    spec = KEYS[next_spec]
    next_spec = next_spec + 1
  end
  local done, reply = pcall(append, KEYS[2 + 2 * i], KEYS[3 + 2 * i], spec, holder, first, count, kind, arg + 4)
  if not done then
    reply = {'error', 0, type(reply) == 'table' and reply.err or tostring(reply)}
  end
  replies[i] = reply
  arg = arg + 4 + count + EXTRA[kind]
end
return replies
