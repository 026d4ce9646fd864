-- repack: move an ended log, step by step, into large packs; nobody at any cursor sees a difference but in `at`.
--
-- KEYS  1 state  2 log  3 the log that is being built  4 repack (ended jobs to do, by when to look at them)
-- ARGV  1 job id  2 packs to read at most  3 bytes a new pack may have  4 ms the unfinished copy lives at most
-- Returns 'more'  there are further steps   'done'  the new log is in place, or there was nothing to gain
--         'gone'  no such job, or it has not ended, or its keys are broken: it is not asked for again
-- Restartable: the copy's last id says where to go on, so a step may be repeated, by another process too. The copy expires
-- by itself. The swap is one RENAME: a reader has either log, and the same events in both.
-- flags: allow-oom

local function step()
  local s = redis.call('HMGET', KEYS[1], 'seq', 'ended')
  if not s[1] or not s[2] then
    redis.call('ZREM', KEYS[4], ARGV[1])
    return 'gone'
  end
  local built = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
  local last = built[1] and string.match(built[1][1], '^%d+') or '0'
  local packs = redis.call('XRANGE', KEYS[2], string.format('%.0f', last + 1) .. '-0', '+', 'COUNT', ARGV[2])

  local bytes = 0
  for i = 1, #packs do
    bytes = bytes + #packs[i][2][6]
  end
  -- Below 2 KB a pack's own 30 to 40 bytes and the tree's nodes count; above there is nothing to gain.
  if last == '0' and bytes > 2048 * #packs then
    redis.call('ZREM', KEYS[4], ARGV[1])
    return 'done'
  end

  local most = tonumber(ARGV[3])
  local attempt, at, id, parts, size
  local function flush()
    if parts then
      redis.call('XADD', KEYS[3], id, 'a', attempt, 't', at, 'e', '[' .. table.concat(parts, ',') .. ']')
    end
  end
  for i = 1, #packs do
    local fields = packs[i][2] -- a, attempt, t, time, e, events
    local events = string.sub(fields[6], 2, -2)
    if not parts or fields[2] ~= attempt or size + #events > most then
      flush()
      attempt, at, parts, size = fields[2], fields[4], {}, 0
    end
    parts[#parts + 1] = events
    size = size + #events
    id = packs[i][1]
  end
  flush()

  local dies = redis.call('PEXPIRETIME', KEYS[1]) -- -1: somebody keeps the job
  if #packs == tonumber(ARGV[2]) then
    redis.call('PEXPIRE', KEYS[3], ARGV[4])
    if dies >= 0 then -- not beyond the job's own life: the next job of this id must not find it
      redis.call('PEXPIREAT', KEYS[3], dies, 'LT')
    end
    return 'more'
  end
  if redis.call('EXISTS', KEYS[3]) == 1 then
    -- A stream's last node holds 4 KB however little is in it, until the next is begun: begin one, and take it away.
    local beyond = string.format('%.0f', s[1] + 1) .. '-0'
    redis.call('XADD', KEYS[3], beyond, 'x', string.rep('x', 4096))
    redis.call('XDEL', KEYS[3], beyond)
    redis.call('RENAME', KEYS[3], KEYS[2])
    if dies < 0 then
      redis.call('PERSIST', KEYS[2])
    else
      redis.call('PEXPIREAT', KEYS[2], dies)
    end
  end
  redis.call('ZREM', KEYS[4], ARGV[1])
  return 'done'
end

local done, reply = pcall(step)
if not done then
  redis.call('DEL', KEYS[3])
  redis.call('ZREM', KEYS[4], ARGV[1])
  return 'gone'
end
return reply
